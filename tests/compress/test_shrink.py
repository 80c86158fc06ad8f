"""A model in memory, alone and within a larger one: what it gives, where it ends up, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from builders import STRUCTURES, TINY, randomise, shallow
from torch import Tensor, nn
from torch.nn.utils import prune

import toolchain
from toolchain.compress.submodule import Submodule
from toolchain.compress.witness import Readout, witnessed
from toolchain.errors import BudgetError, DataError, ModelError
from toolchain.outputs import Output
from toolchain.recipe import CompressSection

HEADLESS = {**TINY, "num_classes": 0}
UNIFORM = CompressSection(allocation="uniform")  # where how well the outputs are kept is not the question


def vit(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**HEADLESS, **kwargs})).eval()


def pictures(count: int = 24, batch: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 3, 32, 32, generator=generator).split(batch))


class Detector(nn.Module):
    """Boxes from the patch tokens of a backbone, read in one of several ways."""

    def __init__(self, way: str, **kwargs: object) -> None:
        super().__init__()
        self.way, self.backbone = way, nn.ModuleDict({"body": vit(**kwargs)})
        self.neck = nn.Linear(48, 4)

    def forward(self, images: Tensor) -> Tensor:
        body = self.backbone["body"]
        scaled = images * 2 - 1
        if self.way == "forward_intermediates":
            maps = body.forward_intermediates(scaled, indices=[0, 1], intermediates_only=True)
            tokens = sum(features.flatten(2).mT for features in maps)
        elif self.way == "forward_features":
            tokens = body.forward_features(scaled)
        else:
            tokens = body(scaled)
        return self.neck(tokens)


WAYS = ("forward", "forward_features", "forward_intermediates")


def params(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_model_alone_comes_back_smaller_and_the_original_stays():
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, plan = toolchain.shrink(model, pictures(), params=0.6)
    assert params(small) <= 0.6 * params(model)
    assert plan.keeps
    assert type(small) is type(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    images = torch.cat(pictures())
    wanted, got = model(images), small(images)
    assert (got - wanted).square().sum() < 0.5 * (wanted - wanted.mean(0)).square().sum()


def test_nothing_to_remove_changes_nothing():
    model = vit(num_classes=5)
    small, _ = toolchain.shrink(model, pictures(), params=1.0)
    images = torch.cat(pictures())
    torch.testing.assert_close(small(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_backbone_shrinks_in_its_place(way: str):
    detector = Detector(way).eval()
    images = torch.cat(pictures())
    wanted, neck = detector(images), detector.neck.weight.clone()
    before = params(detector.backbone)
    same, _ = toolchain.shrink(detector, pictures(), params=0.7, at="backbone.body")
    assert same is detector
    assert params(detector.backbone) <= 0.7 * before
    assert torch.equal(detector.neck.weight, neck)
    got = detector(images)
    assert (got - wanted).square().sum() < 0.5 * (wanted - wanted.mean(0)).square().sum()


@pytest.mark.slow
def test_the_larger_model_exports_as_it_is(tmp_path: Path):
    detector = Detector("forward_features").eval()
    toolchain.shrink(detector, pictures(), params=0.7, at="backbone.body", compress=UNIFORM)
    images = pictures()[0][:1]
    torch.onnx.export(detector, (images,), tmp_path / "detector.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), detector(images), atol=1e-4, rtol=1e-4)


def test_what_the_larger_model_feeds_the_backbone_is_what_counts():
    detector = Detector("forward_features")
    images, readout = witnessed(detector.backbone["body"], detector, pictures(8, 4))
    torch.testing.assert_close(images, torch.cat(pictures(8, 4)) * 2 - 1)
    assert readout == Readout("forward_features")
    assert "forward_features" not in vars(detector.backbone["body"])


def test_intermediate_features_are_told_by_their_numbers():
    detector = Detector("forward_intermediates")
    _, readout = witnessed(detector.backbone["body"], detector, pictures(8, 4))
    assert readout == Readout("forward_intermediates", ("blocks.0", "blocks.1"), normed=False)


def test_forward_takes_whatever_the_images_are():
    detector = Detector("forward")
    samples = [{"image": batch, "boxes": None} for batch in pictures()]
    small, _ = toolchain.shrink(
        detector,
        samples,
        params=0.8,
        at="backbone.body",
        forward=lambda sample: detector(sample["image"]),
        compress=UNIFORM,
    )
    assert small is detector


def test_mode_type_and_gradients_stay_as_they_were():
    model = vit().train().to(torch.bfloat16).requires_grad_(False)
    small, _ = toolchain.shrink(model, pictures(), params=0.7, compress=UNIFORM)
    assert small.training
    assert model.training
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_every_part_keeps_its_own_mode_type_and_gradients():
    detector = Detector("forward").train()
    body = detector.backbone["body"]
    body.eval().blocks[0].requires_grad_(False)
    toolchain.shrink(detector, pictures(), params=0.7, at="backbone.body", compress=UNIFORM)
    smaller = detector.backbone["body"]
    assert smaller is not body
    assert detector.training
    assert not any(module.training for module in smaller.modules())
    assert not any(parameter.requires_grad for parameter in smaller.blocks[0].parameters())
    assert all(parameter.requires_grad for parameter in smaller.blocks[1].parameters())


def test_a_type_of_its_own_stays_with_its_tensor():
    part = vit().to(torch.bfloat16)
    part.norm.float()
    smaller = Submodule.of(part, "").fill(vit())
    assert smaller.norm.weight.dtype == torch.float32
    assert smaller.blocks[1].mlp.fc1.weight.dtype == torch.bfloat16


def test_every_name_of_the_backbone_is_the_smaller_one():
    detector = Detector("forward").eval()
    detector.alias = detector.backbone["body"]
    toolchain.shrink(detector, pictures(), params=0.7, at="alias", compress=UNIFORM)
    assert detector.alias is detector.backbone["body"]


def compiled(detector: Detector) -> None:
    detector.backbone["body"] = torch.compile(detector.backbone["body"])


def overridden(detector: Detector) -> None:
    body = detector.backbone["body"]
    body.forward = partial(body.forward_features)


def hooked(detector: Detector) -> None:
    detector.backbone["body"].blocks[0].register_forward_hook(lambda *_: None)


def hooked_backward(detector: Detector) -> None:
    detector.backbone["body"].blocks[0].register_full_backward_hook(lambda *_: None)


def pruned(detector: Detector) -> None:
    prune.l1_unstructured(detector.backbone["body"].blocks[0].mlp.fc1, "weight", amount=0.5)


def computed(detector: Detector) -> None:
    body = detector.backbone["body"]
    body.blocks[1].seen = body(pictures()[0])


def tied(detector: Detector) -> None:
    detector.other = nn.Linear(48, 48)
    detector.other.weight = detector.backbone["body"].blocks[0].attn.proj.weight


def listed(detector: Detector) -> None:
    detector.encoders = [detector.backbone["body"]]


def bound(detector: Detector) -> None:
    detector.encode = detector.backbone["body"].forward_features


@pytest.mark.parametrize(
    ("entangle", "at", "message"),
    [
        (listed, "backbone.body", "encoders holds it outside of the modules, and would keep the old one"),
        (bound, "backbone.body", "encode holds it outside of the modules"),
        (compiled, "backbone.body._orig_mod", "before torch.compile"),
        (overridden, "backbone.body", "its forward was replaced"),
        (compiled, "backbone.body", "before torch.compile"),
        (hooked, "backbone.body", r"blocks\.0 has the hook <lambda>, .* take it off first"),
        (hooked_backward, "backbone.body", r"blocks\.0 has the hook <lambda>"),
        (pruned, "backbone.body", r"blocks\.0\.mlp\.fc1 has the hook L1Unstructured, .*prune\.remove"),
        (computed, "backbone.body", r"cannot be copied \(.*beside its modules and weights, here blocks\.1\.seen"),
        (tied, "backbone.body", "other.weight, outside of it"),
    ],
)
def test_what_a_smaller_one_would_not_do_is_refused(entangle: Callable[[Detector], None], at: str, message: str):
    detector = Detector("forward")
    entangle(detector)
    with pytest.raises(ModelError, match=message):
        toolchain.shrink(detector, pictures(), at=at)


def test_a_model_that_never_runs_the_part_is_told_at_once():
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.zeros(1, 3, 32, 32)

    detector = Detector("forward")
    with pytest.raises(ModelError, match="does not run what is to shrink"):
        toolchain.shrink(detector, endless(), at="backbone.body", forward=lambda images: images)


def test_a_mask_is_no_image_and_is_refused():
    body = vit()
    masked = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    with pytest.raises(ModelError, match="attn_mask"):
        toolchain.shrink(body, pictures(), forward=lambda images: body.forward_features(images, attn_mask=masked))
    with pytest.raises(ModelError, match="images"):
        toolchain.shrink(body, pictures(), forward=lambda images: body({"patches": images}))


def test_tokens_of_a_call_are_tokens():
    small, plan = toolchain.shrink(vit(global_pool=""), pictures(), params=0.7, compress=UNIFORM)
    assert plan.model.output == "tokens"
    assert small(pictures()[0]).shape == (8, 5, 48)


def test_numbers_that_are_no_classes_are_kept_as_numbers(caplog: pytest.LogCaptureFixture):
    model = vit(num_classes=4)
    model.head.weight.data.mul_(20)  # pixels, say: a softmax of such numbers is nearly always one and the same class
    images = torch.cat(pictures(48))
    wanted = model(images)

    @torch.no_grad()
    def error(output: Output | None) -> float:
        small, plan = toolchain.shrink(model, pictures(48), params=0.6, output=output)
        assert plan.model.output == output
        return float((small(images) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())

    as_classes = error(None)
    assert "taken for class logits" in caplog.text
    caplog.clear()
    assert error("regression") < 0.8 * as_classes
    assert "taken for" not in caplog.text


def test_the_outputs_of_a_projection_are_features(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    kwargs = {**TINY, "num_classes": 512}
    tower = randomise(timm.create_model("vit_base_patch32_clip_224", **kwargs)).eval()
    _, plan = toolchain.shrink(tower, pictures(), params=0.8, compress=UNIFORM)
    assert plan.model.output == "features"
    assert "taken for" not in caplog.text


@pytest.mark.parametrize(("kwargs", "output"), [({}, "logits"), ({"global_pool": ""}, "features"), ({}, "tokens")])
def test_outputs_that_are_not_what_was_said_are_refused(kwargs: dict[str, str], output: Output):
    with pytest.raises(ModelError, match=f"output is '{output}'"):
        toolchain.shrink(vit(**kwargs), pictures(), params=0.7, output=output)


def test_pairs_and_single_images_are_read_as_a_loader_gives_them():
    pairs = [(image, 3) for image in torch.cat(pictures())]
    one, _ = toolchain.shrink(vit(), pairs, params=0.7, compress=UNIFORM)
    other, _ = toolchain.shrink(vit(), pictures(), params=0.7, compress=UNIFORM)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("", r"at = 'backbone\.body' would be"),
        ("backbone.nose", "there is nothing at"),
        ("neck", "is a Linear of torch"),
    ],
)
def test_a_part_that_is_no_model_of_a_family_is_refused_with_the_right_path(at: str, message: str):
    with pytest.raises(ModelError, match=message):
        toolchain.shrink(Detector("forward"), pictures(), at=at)


def test_too_few_or_unequal_images_are_refused():
    with pytest.raises(DataError, match="there are no images"):
        toolchain.shrink(vit(), [])
    with pytest.raises(DataError, match="there are 4 images"):
        toolchain.shrink(vit(), pictures(4, 4))
    with pytest.raises(ModelError, match="give forward"):
        toolchain.shrink(vit(), ["a.png"])
    sizes = [torch.zeros(4, 3, 32, 32), torch.zeros(4, 3, 48, 48)]
    with pytest.raises(ModelError, match=r"cannot run on your images, a batch of 4×3×48×48"):
        toolchain.shrink(vit(), [torch.zeros(4, 3, 48, 48)])
    body = vit()
    pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(DataError, match="normalised floats"):
        toolchain.shrink(body, [pixels], forward=body)
    with pytest.raises(DataError, match="normalised floats"):
        toolchain.shrink(body, [pixels])
    with pytest.raises(ModelError, match="got a str"):
        toolchain.shrink("vit_tiny_patch16_224", pictures())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="of several sizes"):
        toolchain.shrink(vit(dynamic_img_size=True), sizes)


def test_every_limit_of_a_recipe_holds_in_memory():
    model = vit()
    by_size, _ = toolchain.shrink(model, pictures(), size="60%", compress=UNIFORM)
    assert params(by_size) <= 0.6 * params(model)
    _, plan = toolchain.shrink(model, pictures(), macs=0.6, compress=UNIFORM)
    assert plan.provenance["budget"]["macs"] == 0.6
    half, _ = toolchain.shrink(model, pictures(), compress=UNIFORM.model_copy(update={"align": 4}))
    assert params(half) <= 0.5 * params(model)
    for limit, words in (({"macs": 1.2}, "macs is the share"), ({"size": "12"}, "size")):
        with pytest.raises(BudgetError, match=words):
            toolchain.shrink(model, pictures(), **limit)


def test_a_share_out_of_reach_names_the_range():
    with pytest.raises(BudgetError, match="reach"):
        toolchain.shrink(vit(), pictures(), params=0.01)
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        toolchain.shrink(vit(), pictures(), params=1.5)


@pytest.mark.parametrize("share", [50, 0, "half", "150%"])
def test_a_share_that_is_none_is_refused_before_any_work(share: object):
    with pytest.raises(BudgetError, match=r"^params is the share that is left, .*such as 0.5 or '50%'"):
        toolchain.shrink(vit(), pictures(), params=share)


class Shifted(nn.Linear):
    """A linear that adds what its weights do not say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


class Competing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 20 * x.softmax(-1)


def shifted(model: nn.Module) -> None:
    model.blocks[0].mlp.fc1 = Shifted(48, 192)


def adapted(model: nn.Module) -> None:
    model.blocks[0].attn.qkv = nn.Sequential(model.blocks[0].attn.qkv)


def replaced(model: nn.Module) -> None:
    layer = model.blocks[1].mlp.fc2
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight, layer.bias)


def normed(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)


def tied(model: nn.Module) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def one_scale(model: nn.Module) -> None:
    model.blocks[1].ls1 = model.blocks[0].ls1


def one_bias(model: nn.Module) -> None:
    """As a checkpoint in which they are tied makes them, by `load_state_dict(…, assign=True)`."""
    model.blocks[1].mlp.fc2.bias = nn.Parameter(model.blocks[0].attn.proj.bias.data)


def positive(model: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(model.blocks[0].ls1, "gamma", nn.Softplus())


def competing(model: nn.Module) -> None:
    model.blocks[0].mlp.act = Competing()


class Slopes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 192))

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * self.weight


def with_slopes(model: nn.Module) -> None:
    model.blocks[1].mlp.act = Slopes()


def adapted_output(model: nn.Module) -> None:
    model.blocks[1].attn.proj = nn.Sequential(model.blocks[1].attn.proj)


def split(model: nn.Module) -> None:
    pair = OrderedDict(down=nn.Linear(48, 8, bias=False), up=nn.Linear(8, 144))
    model.blocks[0].attn.qkv = nn.Sequential(pair)


def empty(model: nn.Module) -> None:
    model.to("meta")


class Codes(Tensor):
    """As torchao and torch's own distribution make weights of another kind."""


def coded(model: nn.Module) -> None:
    model.blocks[0].mlp.fc1.weight = nn.Parameter(model.blocks[0].mlp.fc1.weight.detach().as_subclass(Codes))


LATE = (adapted, adapted_output, split)
"""What only the part's family knows to look at."""
ODD = [
    (adapted_output, r"blocks\.1\.attn\.proj is a Sequential and no nn\.Linear: merge adapters"),
    (split, r"qkv is a Sequential and no nn\.Linear: it has been split into two before"),
    (empty, r"cls_token is on the meta device and has no values"),
    (coded, r"blocks\.0\.mlp\.fc1\.weight is a Codes, .* before it is quantised or distributed"),
    (shifted, r"blocks\.0\.mlp\.fc1 is a Shifted whose forward is its own, .* merge what it adds"),
    (replaced, r"blocks\.1\.mlp\.fc2 is a Linear whose forward is its own"),
    (adapted, r"qkv is a Sequential and no nn\.Linear: merge adapters"),
    (normed, r"blocks\.0\.mlp\.fc1 has parametrizations; take them off first"),
    (tied, r"blocks\.1\.mlp\.fc1\.weight is blocks\.0\.mlp\.fc1\.weight as well; give it a copy"),
    (one_scale, r"blocks\.1\.ls1\.gamma is blocks\.0\.ls1\.gamma as well; give it a copy"),
    (one_bias, r"blocks\.1\.mlp\.fc2\.bias is blocks\.0\.attn\.proj\.bias as well; give it a copy"),
    (positive, r"blocks\.0\.ls1 has parametrizations; take them off first"),
    (competing, r"blocks\.0\.mlp\.act, a Competing, treats neurons differently or together"),
    (with_slopes, r"blocks\.1\.mlp\.act, a Slopes, treats neurons differently or together"),
]


@pytest.mark.parametrize(("change", "message"), ODD)
def test_what_would_become_another_function_is_refused_before_any_work(
    change: Callable[[nn.Module], None], message: str
):
    model, seen = vit(init_values=0.1), list[Tensor]()
    change(model)
    with pytest.raises(ModelError, match=message):
        toolchain.shrink(model, (seen.append(each) or each for each in pictures()), params=0.6)
    if change not in LATE:
        assert seen == []


def test_an_activation_of_a_block_that_is_both_at_once_is_looked_at_too():
    module = shallow("parallel scaling").module
    module.blocks[0].mlp_act = Competing()
    with pytest.raises(ModelError, match=r"blocks\.0\.mlp_act, a Competing, treats neurons differently or together"):
        Submodule.of(module, "")


@pytest.mark.slow
@pytest.mark.parametrize("case", STRUCTURES)
def test_no_model_of_a_family_is_refused_for_it(case: str):
    module = shallow(case).module
    assert Submodule.of(module, "").part is module


@pytest.mark.parametrize("act", [nn.GELU, nn.ReLU, nn.SiLU, nn.PReLU, nn.Hardswish, partial(nn.ReLU, inplace=True)])
def test_activations_that_work_on_each_number_alone_are_taken(act: Callable[[], nn.Module]):
    model = vit()
    for block in model.blocks:
        block.mlp.act = act()
    small, _ = toolchain.shrink(model, pictures(), params=0.6, compress=UNIFORM)
    assert count(small) <= 0.6 * count(model)


def count(model: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)
def test_a_quantised_model_and_inference_mode_are_refused():
    quantised = torch.ao.quantization.quantize_dynamic(vit(), {nn.Linear})
    with pytest.raises(ModelError, match=r"quantised|no nn\.Linear"):
        toolchain.shrink(quantised, pictures(), params=0.6)
    with torch.inference_mode(), pytest.raises(ModelError, match=r"outside of torch\.inference_mode"):
        toolchain.shrink(vit(), pictures(), params=0.6)


def test_images_that_nobody_normalised_are_told(caplog: pytest.LogCaptureFixture):
    toolchain.shrink(vit(), [each.sigmoid() for each in pictures()], params=0.6, compress=UNIFORM)
    assert "The images lie in 0…1; were they normalised" in caplog.text
    caplog.clear()
    toolchain.shrink(vit(), pictures(), params=0.6, compress=UNIFORM)
    assert "0…1" not in caplog.text


def test_weights_that_are_not_finite_are_named():
    model = vit(num_classes=5)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or infinity in blocks\.0\.mlp\.fc1\.weight"):
        toolchain.shrink(model, pictures(), params=0.6)


def test_pixels_that_nobody_normalised_are_told_and_leave_finite_weights(caplog):
    pixels = [batch.sigmoid() * 255 for batch in pictures()]
    small, _ = toolchain.shrink(vit(num_classes=5), pixels, params=0.7, compress=UNIFORM)
    assert "are they still pixels in 0…255?" in caplog.text
    assert bool(small(pixels[0]).isfinite().all())
