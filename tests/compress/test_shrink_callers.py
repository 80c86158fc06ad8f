"""What a caller's torch is set to, and what a caller did to a model, before it is shrunk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType

import pytest
import timm
import torch
from builders import TINY, named, randomise
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import toolchain
from toolchain.compress.submodule import Submodule
from toolchain.errors import DataError, ModelError
from toolchain.families import adapt
from toolchain.progress import Progress
from toolchain.recipe import CompressSection

UNIFORM = CompressSection(allocation="uniform")


def vit(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs})).eval()


def pictures() -> list[Tensor]:
    return list(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(8))


class Default(AbstractContextManager):
    """A block in which new tensors are of a type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "float64": lambda: Default(torch.float64),
    "bfloat16": lambda: Default(torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_torch_has_no_part_in_what_comes_out(setting: str):
    def outputs(context: AbstractContextManager) -> Tensor:
        model, images = vit(), pictures()
        with context:
            small, _ = toolchain.shrink(model, images, params=0.7, output="logits")
            dtype = torch.get_default_dtype()
        assert dtype == (context.dtype if isinstance(context, Default) else torch.float32)
        return small(images[0])

    torch.testing.assert_close(outputs(SETTINGS[setting]()), outputs(nullcontext()), rtol=2e-2, atol=2e-2)


class Seen:
    """Watches the precision of products while a model is shrunk."""

    def __init__(self) -> None:
        self.precisions = set[str]()

    def at(self, share: float, text: str) -> None:
        self.precisions.add(torch.backends.mkldnn.matmul.fp32_precision)


@pytest.fixture
def products():
    """torch's switches for products of matrices, as they were after the test."""
    switches = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [each.fp32_precision for each in switches]
    yield switches
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("cpu", ["bf16", "tf32", "ieee"])
def test_products_are_whole_whatever_a_caller_asked_for(products, cpu: str):
    """torch.set_float32_matmul_precision, which trainers call for a GPU, sets both: newer CPUs then multiply in bfloat16."""
    seen = Seen()
    products[0].fp32_precision, products[1].fp32_precision = cpu, "tf32"
    toolchain.shrink(vit(), pictures(), params=0.7, output="logits", compress=UNIFORM, progress=Progress(seen))
    assert [each.fp32_precision for each in products] == [cpu, "tf32"]
    assert seen.precisions == {"ieee"}
    with pytest.raises(DataError):
        toolchain.shrink(vit(), [torch.zeros(1, 3, 32, 32)], params=0.7, output="logits", compress=UNIFORM)
    assert [each.fp32_precision for each in products] == [cpu, "tf32"], "after an error"


def test_a_model_that_was_compiled_in_place_is_looked_into():
    model = vit()
    model.compile(backend="eager", fullgraph=True)
    small, _ = toolchain.shrink(model, pictures(), params=0.7, output="logits", compress=UNIFORM)
    assert small._compiled_call_impl is None


def test_a_neighbour_may_be_compiled():
    larger = nn.Sequential(vit(), torch.compile(nn.Linear(7, 7), backend="eager"))
    shrunk = toolchain.shrink(larger, pictures(), params=0.7, at="0", compress=UNIFORM)
    with torch.no_grad():  # Dynamo warns of gradients
        assert shrunk.model(pictures()[0]).shape[1] == 7


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_checkpointing_of_blocks_hides_nothing_and_stays_on(name: str):
    swin = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    model = randomise(timm.create_model(name, **(TINY if "vit" in name else swin))).train()
    model.set_grad_checkpointing(True)
    marks = [getattr(module, "grad_checkpointing", None) for module in model.modules()]
    small, _ = toolchain.shrink(model, pictures(), params=0.8, output="logits", compress=UNIFORM)
    assert [getattr(module, "grad_checkpointing", None) for module in small.modules()] == marks
    assert [getattr(module, "grad_checkpointing", None) for module in model.modules()] == marks


class Both(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": x, "two": -x}


def test_what_is_no_tensor_is_refused_and_the_advice_works():
    model = vit()
    model.head = Both()
    with pytest.raises(ModelError, match=r"returns a dict, .* pass forward = lambda images: model\.forward_features"):
        toolchain.shrink(model, pictures(), params=0.7)
    small, plan = toolchain.shrink(model, pictures(), 0.7, forward=lambda images: model.forward_features(images))  # noqa: PLW0108
    assert plan.model.layers
    assert set(small(pictures()[0])) == {"one", "two"}


def test_a_head_that_was_taken_off_leaves_features(caplog: pytest.LogCaptureFixture):
    model = vit()
    model.head = nn.Identity()
    assert toolchain.shrink(model, pictures(), params=0.7, compress=UNIFORM).plan.model.output == "features"
    assert "taken for class logits" not in caplog.text


@pytest.mark.parametrize(
    ("classes", "outputs", "meaning"), [(5, 1, "regression"), (0, 4, "logits"), (1, 4, "logits"), (5, 5, None)]
)
def test_a_head_that_was_put_on_says_what_the_outputs_are(classes: int, outputs: int, meaning: str | None):
    """Once one number was held against another by a softmax, of which nothing can differ."""
    model = vit(num_classes=classes)
    model.head = nn.Linear(48, outputs)
    small, plan = toolchain.shrink(model, pictures(), params=0.7, compress=UNIFORM)
    assert plan.model.output == meaning
    assert small(pictures()[0]).shape == (8, outputs)


@pytest.mark.parametrize(("shuffle", "count"), [(True, 24), (False, 24), (False, 23)])
def test_the_first_of_a_data_set_in_its_own_order_are_told(
    shuffle: bool, count: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("toolchain.compress.witness.MOST", 23)
    loader = DataLoader(TensorDataset(torch.cat(pictures())[:count]), batch_size=8, shuffle=shuffle)
    toolchain.shrink(vit(), loader, params=0.7, compress=UNIFORM)
    assert ("The first 23 of 24 images were read" in caplog.text) == (count == 24 and not shuffle)


@pytest.mark.parametrize("features", [True, False])
def test_a_classifier_that_was_never_trained_is_told(features: bool, caplog: pytest.LogCaptureFixture):
    model = vit()
    model.head.bias.data.zero_()
    model.head.weight.data.normal_(0, 0.02)
    forward = (lambda images: model.forward_features(images)) if features else None  # noqa: PLW0108
    toolchain.shrink(model, pictures(), params=0.7, compress=UNIFORM, forward=forward)
    assert ("looks as timm starts it" in caplog.text) != features


@pytest.mark.parametrize(("output", "scale"), [("logits", 0.02), (None, 1.0)])
def test_a_classifier_without_biases_may_be_a_trained_one(
    output: str | None, scale: float, caplog: pytest.LogCaptureFixture
):
    """Kind: a head out of the embeddings of texts; and one that was declared to be meant."""
    model = vit()
    model.head.bias.data.zero_()
    model.head.weight.data.normal_(0, scale)
    toolchain.shrink(model, pictures(), params=0.7, compress=UNIFORM, output=output)
    assert "looks as timm starts it" not in caplog.text


class Endless(Dataset[Tensor]):
    """A data set that does not know how many it has."""

    def __getitem__(self, index: int) -> Tensor:
        if index == 24:
            raise IndexError(index)
        return torch.cat(pictures())[index]


def test_an_order_that_is_none_is_not_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """What was dropped was not left out, what is drawn at random has no order, and what has no length has no rest."""
    images = TensorDataset(torch.cat(pictures())[:24])
    drawn = Subset(images, torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist())
    toolchain.shrink(vit(), DataLoader(images, batch_size=10, drop_last=True), params=0.7, compress=UNIFORM)
    toolchain.shrink(vit(), Endless(), params=0.7, compress=UNIFORM)
    monkeypatch.setattr("toolchain.compress.witness.MOST", 23)
    toolchain.shrink(vit(), DataLoader(drawn, batch_size=8), params=0.7, compress=UNIFORM)
    assert "in the order of the data set" not in caplog.text


def test_a_head_that_was_put_on_may_be_declared():
    model = vit(num_classes=0)
    model.head = nn.Linear(48, 4)
    _, plan = toolchain.shrink(model, pictures(), params=0.7, compress=UNIFORM, output="multi-label")
    assert plan.model.output == "multi-label"


def test_outputs_without_a_dimension_of_their_own_are_refused():
    model = vit(num_classes=1)
    model.head = nn.Sequential(model.head, nn.Flatten(0))
    with pytest.raises(ModelError, match=r"gives \[1\] for one image, and \[1, numbers\] is wanted"):
        toolchain.shrink(model, pictures(), params=0.7)


def test_an_output_that_there_is_not_is_refused():
    with pytest.raises(ModelError, match=r"output is one of 'logits', .*, got 'logit'"):
        toolchain.shrink(vit(), pictures(), output="logit")  # type: ignore[arg-type]


def positions(model: nn.Module) -> None:
    old = model._pos_embed
    model._pos_embed = lambda x: 5 * old(x)


def attention(model: nn.Module) -> None:
    old = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda x, **kwargs: 2 * old(x, **kwargs)


def one_block_twice(model: nn.Module) -> None:
    model.blocks[1] = model.blocks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (positions, "its _pos_embed was replaced on the instance"),
        (attention, r"its blocks\.1\.attn\.forward was replaced on the instance"),
        (one_block_twice, r"blocks\.1\.norm1\.weight is blocks\.0\.norm1\.weight as well"),
    ],
)
def test_a_method_or_a_block_that_a_copy_would_share_is_refused(change: Callable[[nn.Module], None], message: str):
    model = vit()
    change(model)
    with pytest.raises(ModelError, match=message):
        toolchain.shrink(model, pictures(), params=0.7)


def in_equal_heads(self: nn.Module, x: Tensor, **_: object) -> Tensor:
    """Attention as it is often written anew, to see its weights: heads are as wide as the stream allows."""
    batch, tokens, width = x.shape
    parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
    mixed = nn.functional.scaled_dot_product_attention(*parts)
    return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


def test_a_forward_that_counts_on_the_widths_of_before_is_refused():
    model = vit()
    model.blocks[0].attn.forward = MethodType(in_equal_heads, model.blocks[0].attn)
    with pytest.raises(
        ModelError, match=r"is not what was decided: its outputs cannot be computed so .*take it off first"
    ):
        toolchain.shrink(model, pictures(), params=0.7, output="logits", compress=UNIFORM)


def test_a_scale_that_somebody_changed_stays_as_it_was():
    model = vit()
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 3 * block.attn.scale
    small, _ = toolchain.shrink(model, pictures(), params=0.7, output="logits", compress=UNIFORM)
    for block in small.blocks:
        assert block.attn.head_dim < 16
        assert block.attn.scale == pytest.approx(3 * block.attn.head_dim**-0.5)


class Coded(nn.Module):
    """A larger model whose first weights are codes."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
        self.body = vit()

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def test_images_have_the_type_of_the_first_weight_that_has_a_point():
    model = Coded()
    assert toolchain.shrink(model, pictures(), params=0.7, at="body", output="logits", compress=UNIFORM).model is model


def test_a_model_that_no_call_runs_is_told_of_forward():
    with pytest.raises(
        ModelError, match=r'"forward" function\. Give images .*, or forward, a function that runs the model'
    ):
        toolchain.shrink(nn.ModuleDict({"student": vit()}), pictures(), params=0.7, at="student")


def test_a_bias_that_timm_keeps_apart_learns_as_its_linear_does():
    name, kwargs = named("BEiT")
    part = timm.create_model(name, **kwargs)
    part.cls_token.requires_grad_(False)
    smaller = copy.deepcopy(part)
    adapt(smaller)
    filled = Submodule.of(part, "").fill(smaller)
    assert filled.blocks[0].attn.qkv.bias.requires_grad
    assert not filled.cls_token.requires_grad


def test_what_averages_gradients_is_not_looked_into():
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)  # a whole one needs a group of processes
    nn.Module.__init__(wrapper)
    wrapper.module = vit()
    with pytest.raises(ModelError, match=r"the model is a DistributedDataParallel, .*shrink the module in it"):
        toolchain.shrink(wrapper, pictures(), params=0.7, at="module")
