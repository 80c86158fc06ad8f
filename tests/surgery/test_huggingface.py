"""Folders of Hugging Face transformers: the timm model that is built from one computes what transformers' does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from damage import json_damaged
from hub_server import Repository, visited
from safetensors.torch import load_file
from sweeps import swept
from torch import Tensor, nn

from toolchain.data.transforms import Wanted
from toolchain.errors import ArtifactError, ModelError, SlimvitError, StorageError
from toolchain.recipe import ModelSection, Recipe
from toolchain.surgery.huggingface import LAYOUTS
from toolchain.surgery.huggingface.folder import Folder, is_folder
from toolchain.surgery.huggingface.layout import ratio
from toolchain.surgery.huggingface.processor import CLASSES, CROP_SIZE, FILTERS
from toolchain.surgery.huggingface.swin import SwinConfig, SwinLayout
from toolchain.surgery.load import Loaded, load_dense
from toolchain.surgery.replay import load_model, save_model

hf = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'slimvit[dev]'")

TOLERANCE = 1e-4
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {**WIDE, "intermediate_size": 72}
VIT = {**TOWER, "image_size": 32, "patch_size": 8}
DINO = {**WIDE, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
BOTH = {"vision_config": VIT, "text_config": TEXT}
ANY_SHAPE = {"vision_config": {**TOWER, "patch_size": 8, "num_patches": 16}, "text_config": TEXT}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
FIVE = {"num_labels": 5}
TABLES = {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {**VIT, **FIVE}),
    "ViT, no classes": (
        "ViTForImageClassification",
        "ViTConfig",
        {**VIT, "num_labels": 0, "hidden_act": "gelu_python"},
    ),
    "ViT, bare": ("ViTModel", "ViTConfig", {**VIT, "qkv_bias": False, "hidden_act": "gelu_new"}),
    "ViT, eps of 1e-5": ("ViTForImageClassification", "ViTConfig", {**VIT, **FIVE, "layer_norm_eps": 1e-5}),
    "ViT, a wide image": ("ViTForImageClassification", "ViTConfig", {**VIT, **FIVE, "image_size": (32, 48)}),
    "MAE": ("ViTMAEForPreTraining", "ViTMAEConfig", {**VIT, "mask_ratio": 0.0, "decoder_hidden_size": 16}),
    "DeiT, distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**VIT, **FIVE}),
    "DeiT, one classifier": ("DeiTForImageClassification", "DeiTConfig", {**VIT, **FIVE}),
    "DeiT, bare": ("DeiTModel", "DeiTConfig", VIT),
    "BEiT": ("BeitForImageClassification", "BeitConfig", {**VIT, **FIVE, **TABLES}),
    "BEiT, class token": (
        "BeitForImageClassification",
        "BeitConfig",
        {**VIT, **FIVE, "use_mean_pooling": False, "layer_scale_init_value": -1.0, "hidden_act": "gelu_python"},
    ),
    "BEiT, shared table": (
        "BeitModel",
        "BeitConfig",
        {**VIT, "use_shared_relative_position_bias": True, "use_mask_token": True},
    ),
    "BEiT, every table": (
        "BeitModel",
        "BeitConfig",
        {**VIT, **TABLES, "use_shared_relative_position_bias": True},
    ),
    "BEiT, masked": (
        "BeitForMaskedImageModeling",
        "BeitConfig",
        {**VIT, **TABLES, "vocab_size": 8, "layer_norm_eps": 1e-6},
    ),
    "DINOv2": ("Dinov2Model", "Dinov2Config", DINO),
    "DINOv2, gated": ("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True, "mlp_ratio": 3}),
    "DINOv2 with registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**DINO, "num_register_tokens": 3},
    ),
    "DINOv2 without registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**DINO, "num_register_tokens": 0, "hidden_act": "gelu_python"},
    ),
    "DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 4, "rope_theta": 50.0}),
    "DINOv3, gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**VIT, "num_register_tokens": 2, "use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "DINOv3, few biases": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**VIT, "proj_bias": False, "mlp_bias": False, "query_bias": False},
    ),
    "CLIP, tower": ("CLIPVisionModel", "CLIPVisionConfig", VIT),
    "CLIP, tower and projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT),
    "CLIP, whole": ("CLIPModel", "CLIPConfig", BOTH),
    "CLIP, classes": ("CLIPForImageClassification", "CLIPConfig", {**BOTH, **FIVE}),
    "SigLIP, tower": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "SigLIP, whole": ("SiglipModel", "SiglipConfig", BOTH),
    "SigLIP, classes": ("SiglipForImageClassification", "SiglipConfig", {**BOTH, **FIVE}),
    "SigLIP, no pooling": ("SiglipVisionModel", "SiglipVisionConfig", {**VIT, "vision_use_head": False}),
    "SigLIP 2, any shape": ("Siglip2VisionModel", "Siglip2VisionConfig", {**TOWER, "patch_size": 8, "num_patches": 16}),
    "SigLIP 2, whole": ("Siglip2Model", "Siglip2Config", ANY_SHAPE),
    "SigLIP 2, classes": ("Siglip2ForImageClassification", "Siglip2Config", {**ANY_SHAPE, **FIVE}),
    "Swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, **FIVE}),
    "Swin, bare": ("SwinModel", "SwinConfig", SWIN),
    "Swin, half a window of padding": ("SwinModel", "SwinConfig", {**SWIN, "image_size": 24}),
    "Swin 2": ("Swinv2ForImageClassification", "Swinv2Config", {**SWIN, **FIVE}),
    "Swin 2, a window as large as the grid": ("Swinv2Model", "Swinv2Config", {**SWIN, "window_size": 16}),
    "Swin 2, bare": ("Swinv2Model", "Swinv2Config", SWIN),
}
"""Name → class, its config's class, and its small sizes."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = hf.utils.logging.get_verbosity()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.set_verbosity(level)


def built(case: str, **changes: object) -> nn.Module:
    """A model of transformers of which no weight is what it was started at."""
    kind, config, values = CASES[case]
    torch.manual_seed(0)
    model: nn.Module = getattr(hf, kind)(getattr(hf, config)(**{**values, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(path: Path, case: str = "ViT", **changes: object) -> Path:
    built(case, **changes).save_pretrained(path)
    return path


def images(size: Sequence[int] = (32, 32)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def expected(model: nn.Module, case: str, x: Tensor, **options: bool) -> Tensor:
    """What a layout says that the model gives: logits, or features, or tokens."""
    if case.startswith("SigLIP 2"):
        rows, columns = x.shape[2] // 8, x.shape[3] // 8
        pixels = x.reshape(-1, 3, rows, 8, columns, 8).permute(0, 2, 4, 3, 5, 1).reshape(len(x), rows * columns, -1)
        shapes, mask = torch.tensor([[rows, columns]] * len(x)), torch.ones(len(x), rows * columns)
        tower = getattr(model, "vision_model", model) if case == "SigLIP 2, whole" else model
        out = tower(pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)
        return out.logits if hasattr(out, "logits") else out.pooler_output
    if "ForImageClassification" in type(model).__name__:
        return model(x, **options).logits
    if case == "MAE":
        return model.vit(x).last_hidden_state[:, 0]
    if "ForMasked" in type(model).__name__:
        return model.layernorm(model.beit(x).last_hidden_state)[:, 0]
    out = getattr(model, "vision_model", model)(x, **options)
    if type(model).__name__ in ("ViTModel", "DeiTModel"):
        return out.last_hidden_state[:, 0]
    return out.last_hidden_state if out.pooler_output is None else out.pooler_output


def as_file(folder: Path) -> ModelSection:
    return ModelSection(checkpoint=str(folder))


def as_name(folder: Path) -> ModelSection:
    return ModelSection(name=f"local-dir:{folder}")


def holds(folder: Path, case: str, result: Loaded) -> None:
    """Holds a loaded model against transformers'."""
    x = images(result.family.input_size(result.module)[1:])
    with torch.no_grad():
        outputs = result.module(x)
    wanted = expected(getattr(hf, CASES[case][0]).from_pretrained(folder).eval(), case, x)
    assert wanted.std() > 0.1
    assert outputs.shape == wanted.shape
    assert (outputs - wanted).abs().max() < TOLERANCE
    assert "resampled" not in notes(result)


@pytest.mark.parametrize("case", swept(CASES, [*CASES][::2]))
def test_the_timm_model_computes_what_transformers_does(tmp_path, case):
    """Kind: a detail of a layout that was guessed, of every weight and of config.json. Nothing else has to be written."""
    holds(tmp_path, case, load_dense(as_file(saved(tmp_path, case))))


def test_defaults_are_those_of_transformers():
    """Kind: a key that a config.json leaves out, as those of SigLIP do, and that means something else here."""
    unequal = []
    for name, layout in LAYOUTS.items():
        config = hf.AutoConfig.for_model(name)
        theirs = getattr(config, layout.inside) if layout.inside else config
        ours = layout.parsed({})
        for key in set(layout.config.model_fields) - {"architectures", "id2label", "num_labels"}:
            value = getattr(theirs, key, None)
            mine = getattr(ours, key)
            if value is not None and mine not in (
                value,
                (value, value),
                tuple(value) if isinstance(value, list) else value,
            ):
                unequal.append((name, key, mine, value))
    assert not unequal


def test_a_ratio_gives_the_hidden_width_back():
    """Kind: rounding. timm rounds the product down; 4304 of 1152, as SigLIP so400m has it, is no short fraction."""
    widths = [(hidden, width) for width in (1, 7, 96, 384, 1152) for hidden in range(1, 5000, 13)]
    assert all(int(width * ratio(hidden, width)) == hidden for hidden, width in [*widths, (4304, 1152)])


def write(folder: Path, name: str = "config.json", **changes: object) -> None:
    raw = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**raw, **changes}))


def loaded(folder: Path, **values: object) -> Loaded:
    return load_dense(ModelSection(checkpoint=str(folder), **values))


def notes(model: Loaded) -> str:
    return "\n".join(model.provenance["notes"])


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images())


@pytest.mark.slow
def test_a_window_that_timm_cuts_otherwise_is_refused_and_no_other(tmp_path):
    """Kind: padding before a shift or after it, and windows shrunk by one edge or by each: weights fit all the same."""

    class Unchecked(SwinLayout):
        def require_windows(self, config: SwinConfig) -> None: ...

    refused = dict[tuple[str, int, int, int], str]()
    for case, height, width, window in product(("Swin", "Swin 2"), (24, 32), (24, 32), (4, 5, 8)):
        layout = LAYOUTS["swin" if case == "Swin" else "swinv2"]
        assert isinstance(layout, SwinLayout)
        model = built(case, image_size=(height, width), window_size=window)
        config, x = (
            layout.parsed(model.config.to_dict() | {"architectures": ("ForImageClassification",)}),
            images((height, width)),
        )
        design = Unchecked(layout.name, layout.architecture, cosine=layout.cosine).design(config)
        module = timm.create_model(design.architecture, **design.kwargs).eval()
        model.save_pretrained(tmp_path)
        wrong = False
        try:
            wanted = expected(model, case, x)
            module.load_state_dict(layout.converted(load_file(tmp_path / "model.safetensors"), config).state)
            with torch.no_grad():
                wrong = bool((module(x) - wanted).abs().max() > TOLERANCE)
        except RuntimeError:  # windows larger than the grid, for which transformers' version 1 has no table
            wrong = True
        try:
            layout.design(config)
        except ModelError as error:
            refused[case, height, width, window] = str(error)
        assert wrong is ((case, height, width, window) in refused)
    assert re.search(
        r"stage 1 is 12×12, and its windows of 5×5 are shifted over padding.*20×20", refused["Swin", 24, 24, 5]
    )
    assert "shrunk by one edge for both" in refused["Swin 2", 24, 32, 8]
    assert "its windows of 8×8 are larger" in refused["Swin", 24, 24, 8]


def test_values_of_older_files_of_clip_are_those_that_transformers_takes(tmp_path):
    """Kind: a key that overrides another. `vision_config_dict` replaces `vision_config`, with its defaults."""
    model = built("CLIP, whole")
    model.save_pretrained(tmp_path)
    vision = json.loads((tmp_path / "config.json").read_text())["vision_config"]
    older = {**vision, "hidden_act": "relu"}
    del older["layer_norm_eps"]
    write(tmp_path, vision_config={**vision, "num_attention_heads": 2}, vision_config_dict=older)
    transformer = hf.CLIPModel.from_pretrained(tmp_path).eval()
    assert (answers(loaded(tmp_path).module) - expected(transformer, "CLIP, whole", images())).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", ["ViT", "CLIP, classes", "Swin"])
def test_classes_have_the_names_that_config_json_gives_them(tmp_path, case):
    folder = saved(tmp_path, case)
    assert Folder.open(folder).class_names == ()  # LABEL_0 …
    names = ("tench", "goldfish", "cock", "hen", "ostrich")
    write(folder, id2label={str(index): names[index] for index in (4, 0, 1, 2, 3)})
    assert loaded(folder).class_names == load_dense(as_name(folder)).class_names == names
    assert loaded(folder, kwargs={"num_classes": 0}).class_names == ()
    write(folder, id2label={str(index + 1): name for index, name in enumerate(names)})
    assert loaded(folder).class_names == ()  # of no outputs


def test_a_model_without_a_classifier_has_no_classes_to_name(tmp_path):
    folder = saved(tmp_path, "DINOv2")
    write(folder, id2label={"0": "cat", "1": "dog"}, architectures=["Dinov2ForImageClassification"])
    assert loaded(folder).class_names == ()


# Ways in


@pytest.mark.parametrize("case", ["ViT", "DINOv3, gated", "Swin, bare"])
def test_a_folder_may_be_named_as_a_model(tmp_path, case):
    """Then it is loaded as pretrained weights are, by timm."""
    holds(tmp_path, case, load_dense(as_name(saved(tmp_path, case))))


def test_a_model_folder_needs_the_hugging_face_folder_no_more(tmp_path):
    from toolchain.pipeline.job import begin

    folder = saved(tmp_path / "hf")
    recipe = {"model": {"checkpoint": "hf"}, "data": {"source": "none"}, "compress": {"method": "none"}}
    dense = begin(Recipe.from_dict(recipe, base=tmp_path)).dense
    save_model(dense, tmp_path / "dense")
    wanted = answers(dense.module)
    (folder / "config.json").unlink()
    again = load_model(tmp_path / "dense")
    assert torch.equal(answers(again.module), wanted)
    assert str(tmp_path) not in (tmp_path / "dense" / "model.json").read_text()


def test_the_digest_is_of_config_and_weights(tmp_path):
    folder = saved(tmp_path)
    digest = loaded(folder).provenance["checkpoint_sha256"]
    write(folder, "preprocessor_config.json", **SQUARE)
    other = loaded(folder).provenance["checkpoint_sha256"]
    write(folder, layer_norm_eps=1e-6)
    assert len({digest, other, loaded(folder).provenance["checkpoint_sha256"]}) == 3


def test_weights_in_parts_and_as_torch_writes_them(tmp_path):
    """`save_pretrained` spreads large weights over files; older ones are pickles, of which only tensors are read."""
    model = built("ViT")
    wanted = expected(model, "ViT", images())
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "bin")
    torch.save(load_file(tmp_path / "bin" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    for name in ("parts", "bin"):
        assert torch.allclose(answers(loaded(tmp_path / name).module), wanted, atol=TOLERANCE)
    next((tmp_path / "parts").glob("model-*.safetensors")).unlink()
    with pytest.raises(StorageError, match=r"lacks model-.*\.safetensors, which model\.safetensors\.index\.json names"):
        loaded(tmp_path / "parts")
    write(tmp_path / "parts", "model.safetensors.index.json", weight_map={"a": "../bin/pytorch_model.bin"})
    with pytest.raises(ArtifactError, match="names no files of this folder"):
        loaded(tmp_path / "parts")


def test_a_folder_without_weights_and_one_with_others(tmp_path):
    folder = saved(tmp_path)
    write(folder, num_hidden_layers=3)
    with pytest.raises(ArtifactError, match=r"it has depth 2 \(the model: 3\)"):
        loaded(folder)
    write(folder, model_type="dinov3_vit", intermediate_size=72)
    with pytest.raises(
        ArtifactError, match=r"cannot be converted: it holds \S+, which config\.json does not account for"
    ):
        loaded(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"holds no weights; expected model\.safetensors or"):
        loaded(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "convnext"}, "of model_type 'convnext', which is not supported; known: vit, vit_mae, deit"),
        ({"hidden_size": "wide"}, r"config\.json of model_type 'vit' has a wrong hidden_size"),
        ({"patch_size": 0}, "has a wrong patch_size: Input should be greater than or equal to 1"),
        ({"hidden_act": "mish"}, r"no timm model computes what this 'vit' does: its activation 'mish'"),
        ({"layer_norm_eps": 0.1}, "its layer_norm_eps is 0.1"),
    ],
)
def test_what_no_timm_model_computes_is_refused(tmp_path, changes, words):
    write(saved(tmp_path), **changes)
    with pytest.raises(ModelError, match=words):
        loaded(tmp_path)


@pytest.mark.parametrize("table", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_tables_that_transformers_reads_in_another_order_are_refused(tmp_path, table):
    """Kind: rows taken for columns. The tables fit by shape; of an image that is not square another bias is read."""
    with pytest.raises(ModelError, match="biases by relative position are for 4×6 patches, and read as for a square"):
        loaded(saved(tmp_path, "BEiT, class token", image_size=(32, 48), **{table: True}))


def test_biases_that_are_joined_are_not_told_as_left_out(tmp_path):
    assert "left out" not in notes(loaded(saved(tmp_path, "BEiT")))


def test_only_a_folder_of_transformers_stands_without_a_name(tmp_path):
    torch.save({}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"model\.name is missing, and .*a\.pth does not say it"):
        loaded(tmp_path / "a.pth")
    write(tmp_path, architecture="vit_tiny_patch16_224", model_type="vit")
    assert not is_folder(tmp_path)
    assert not is_folder(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"is a folder: write model\.name = 'local-dir:"):
        load_dense(ModelSection(name=str(tmp_path)))


def test_a_name_may_stand_beside_a_folder_if_it_is_that_model(tmp_path):
    """Kind: weights that fit by shape into a model that computes something else with them."""
    folder = saved(tmp_path)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "mlp_ratio": 2.25, "num_classes": 5}
    same = loaded(folder, name="vit_tiny_patch16_224", kwargs={**kwargs, "num_heads": 4})
    assert torch.allclose(answers(same.module), answers(loaded(folder).module), atol=TOLERANCE)
    for other in ({"num_heads": 2}, {"num_heads": 4, "act_layer": "relu"}):
        with pytest.raises(
            ModelError, match=r"does not compute what its config\.json describes.*Leave model\.name out"
        ):
            loaded(folder, name="vit_tiny_patch16_224", kwargs={**kwargs, **other})


def test_classes_of_ones_own_start_untrained_where_they_are_trained_next(tmp_path):
    """As with timm's pretrained weights: a folder as a name gives what it has."""
    section = ModelSection(name=f"local-dir:{saved(tmp_path, 'DINOv2')}", kwargs={"num_classes": 7})
    with pytest.raises(
        ModelError, match=r"have no classifier and the model 7.*model\.kwargs\.num_classes = 0 gives features"
    ):
        load_dense(section)
    model = load_dense(section, may_be_untrained=True)
    assert "The classifier started untrained" in notes(model)
    wanted = loaded(tmp_path).module.state_dict()
    assert all(torch.equal(model.module.state_dict()[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "parts"])
def test_a_repository_of_a_hub_is_fetched_file_by_file(tmp_path, monkeypatch, form):
    """Only config.json, the processor's and one form of the weights: a repository may hold ten."""
    far, cache = tmp_path / "far", tmp_path / "cache"
    model = built("ViT")
    model.save_pretrained(far, max_shard_size="20KB" if form == "parts" else "1GB")
    write(far, "preprocessor_config.json", **SQUARE)
    if form == "pytorch_model.bin":
        torch.save(load_file(far / "model.safetensors"), far / form)
        (far / "model.safetensors").unlink()
    (far / "tf_model.h5").touch()

    with visited(monkeypatch, cache) as hub:
        hub.repositories["org/name"] = Repository()
        hub.repositories["org/name"].branches["main"] |= {path.name: path.read_bytes() for path in far.iterdir()}
        result = load_dense(ModelSection(name="hf-hub:org/name"))
    assert torch.allclose(answers(result.module), expected(model, "ViT", images()), atol=TOLERANCE)
    assert result.provenance["pretrained"] == "hf-hub:org/name"
    assert result.module.pretrained_cfg["mean"] == pytest.approx((0.1,) * 3)
    fetched = {path.name for path in cache.rglob("*") if path.is_file()}
    assert "config.json" in fetched
    assert "tf_model.h5" not in fetched


# What changes, and what is told


def test_another_image_size_is_resampled_and_told(tmp_path):
    model = loaded(saved(tmp_path), kwargs={"img_size": 48})
    assert model.family.input_size(model.module) == (3, 48, 48)
    assert "were resampled from a grid of 4×4 to 6×6, that is from images of 32×32 to 48×48 pixels" in notes(model)


@pytest.mark.parametrize("size", [24, 48])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("ViT", {"interpolate_pos_encoding": True}),
        ("DeiT, distilled", {"interpolate_pos_encoding": True}),
        ("CLIP, tower", {"interpolate_pos_encoding": True}),
        ("SigLIP, tower", {"interpolate_pos_encoding": True}),
        ("SigLIP 2, any shape", {}),
        ("DINOv2", {}),
        ("DINOv2 with registers", {}),
        ("DINOv3", {}),
    ],
)
def test_another_image_size_is_what_transformers_makes_of_it(tmp_path, case, options, size):
    """Kind: another filter. timm's own widens when it shrinks a grid; of transformers' only some do."""
    transformer = built(case)
    transformer.save_pretrained(tmp_path)
    module = loaded(tmp_path, kwargs={"img_size": size}).module
    x = images((size, size))
    with torch.no_grad():
        assert (module(x) - expected(transformer, case, x, **options)).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", ["DINOv2", "DINOv2 with registers", "ViT", "SigLIP, tower"])
def test_weights_in_half_precision_are_those_that_transformers_reads(tmp_path, case):
    """Kind: sums of tensors in the type that they are stored in. Transformers rounds nothing when it reads them."""
    transformer = built(case).half()
    transformer.save_pretrained(tmp_path)
    wanted = expected(transformer.float(), case, images())
    assert (answers(loaded(tmp_path).module) - wanted).abs().max() < TOLERANCE


def test_tables_of_relative_positions_are_resampled_and_told(tmp_path):
    """Kind: silence. timm's own conversion resamples them and says nothing that a report could hold."""
    model = loaded(saved(tmp_path, "BEiT"), kwargs={"img_size": 48})
    assert "were resampled from 52 to 124 rows" in notes(model)
    assert "tables of relative positions" not in notes(loaded(tmp_path))
    assert model.module(torch.randn(1, 3, 48, 48)).shape == (1, 5)


def test_tokens_of_a_model_that_pools_by_attention(tmp_path):
    transformer = built("SigLIP, tower")
    transformer.save_pretrained(tmp_path)
    model = loaded(tmp_path, output="tokens")
    assert "the model has no pooling, and its outputs are features" in notes(model)
    with torch.no_grad():
        assert torch.allclose(answers(model.module), transformer(images()).last_hidden_state, atol=TOLERANCE)


def test_other_classes_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"has 5 classes, the model 7; set model\.kwargs\.num_classes = 5"):
        loaded(saved(tmp_path), kwargs={"num_classes": 7})


def test_a_classifier_is_left_out_where_the_model_has_none(tmp_path):
    model = loaded(saved(tmp_path), kwargs={"num_classes": 0})
    assert "2 tensors (head.bias, head.weight) were left out: the model has no classifier" in notes(model)
    assert model.ref.output == "features"
    with torch.no_grad():
        wanted = model.module.forward_features(images())[:, 0]
    assert torch.equal(answers(model.module), wanted)


@pytest.mark.parametrize("output", ["tokens", "features"])
def test_outputs_of_a_backbone_are_declared_as_of_any_model(tmp_path, output):
    transformer = built("DINOv2")
    transformer.save_pretrained(tmp_path)
    model = loaded(tmp_path, output=output)
    with torch.no_grad():
        out = transformer(images())
    wanted = out.last_hidden_state if output == "tokens" else out.pooler_output
    assert model.ref.output == output
    assert torch.allclose(answers(model.module), wanted, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("problem", "output"),
    [
        ("multi_label_classification", "multi-label"),
        ("regression", "regression"),
        ("single_label_classification", None),
    ],
)
def test_what_the_outputs_are_is_taken_from_the_folder(tmp_path, problem, output):
    folder = saved(tmp_path)
    write(folder, problem_type=problem)
    assert loaded(folder).ref.output == output
    assert loaded(folder, output="logits").ref.output == "logits"
    assert loaded(folder, kwargs={"num_classes": 0}).ref.output == "features"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("ViT", "Norms add 1e-06 to the variance, as timm's do, and not 1e-12"),
        ("ViT, bare", "were left out: features are the class token after the last norm, without the linear and tanh"),
        (
            "CLIP, tower and projection",
            "visual_projection.weight was left out: features are those before the projection",
        ),
        ("CLIP, whole", r"left out: it belongs to the texts"),
        ("CLIP, classes", "Its last norm was left out: the classifier reads the mean of the patches"),
        ("SigLIP, classes", "Its attention pooling was left out"),
        ("DINOv2", "embeddings.mask_token was left out: only masked pre-training reads it"),
    ],
)
def test_what_is_left_out_is_told(tmp_path, case, words):
    assert words in notes(loaded(saved(tmp_path, case)))


def test_a_classifier_of_dinov2_is_left_out_and_told(tmp_path):
    torch.manual_seed(0)
    model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO)).eval()
    model.save_pretrained(tmp_path)
    result = loaded(tmp_path)
    assert "Its classifier was left out: it reads the class token beside the mean of the patches" in notes(result)
    assert torch.allclose(answers(result.module), model.dinov2(images()).pooler_output, atol=TOLERANCE)


# Preprocessing

SQUARE = {"size": {"height": 32, "width": 32}, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 2}
CROPPED = {
    "size": {"shortest_edge": 40},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
    "resample": 3,
}


@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        (
            SQUARE,
            {"mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear", "crop_pct": 1, "crop_mode": "squash"},
        ),
        (CROPPED, {"interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "center"}),
        ({**SQUARE, "do_center_crop": True, "crop_size": 24}, {"crop_pct": 0.75, "crop_mode": "squash"}),
        (
            {"size": 40, "do_center_crop": True, "crop_size": 32, "image_processor_type": "CLIPImageProcessor"},
            {"crop_mode": "center"},
        ),
        ({"size": 32, "image_processor_type": "ViTFeatureExtractor"}, {"crop_mode": "squash", "crop_pct": 1}),
        ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
        ({**SQUARE, "rescale_factor": 2 / 255}, {"mean": (0.05,) * 3, "std": (0.1,) * 3}),
        ({**CROPPED, "size": 40, "image_processor_type": "SiglipImageProcessor"}, {"crop_mode": "center"}),
        ({"image_processor_type": "CLIPImageProcessor", "size": 256}, {"interpolation": "bicubic", "crop_pct": 0.875}),
        ({"image_processor_type": "BitImageProcessor", "size": 40, "crop_size": 32}, {"crop_pct": 0.8}),
        (
            {"image_processor_type": "DeiTImageProcessor", "size": 40, "crop_size": 32, "do_center_crop": None},
            {"crop_pct": 0.8, "crop_mode": "squash"},
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": 40, "crop_size": 32, "do_normalize": None},
            {"crop_pct": 1, "crop_mode": "squash"},
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": 40, "crop_size": 32, "do_center_crop": False},
            {"crop_pct": 1, "crop_mode": "center"},
        ),
        ({"image_processor_type": "BitImageProcessorFast"}, {"interpolation": "bicubic"}),
        ({"feature_extractor_type": "DeiTFeatureExtractor"}, {"interpolation": "bicubic"}),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 32}, {"crop_pct": 32 / 36, "crop_mode": "center"}),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.9},
            {"crop_pct": 1, "crop_mode": "squash"},
        ),
        ({"size": 32}, {"interpolation": "bilinear"}),
        ({"resample": 0, "max_num_patches": 16}, {"crop_pct": 1, "crop_mode": "squash", "interpolation": "nearest"}),
        ({**SQUARE, "do_resize": False}, {"crop_pct": 1, "crop_mode": "squash"}),
    ],
)
def test_preprocessing_is_that_of_the_folder(tmp_path, processor, wanted):
    folder = saved(tmp_path)
    write(folder, "preprocessor_config.json", **processor)
    config = Folder.open(folder).pretrained_cfg
    assert all(config[key] == pytest.approx(value) for key, value in wanted.items())


@pytest.mark.parametrize(("case", "interpolation"), [("ViT", "bilinear"), ("CLIP, tower", "bicubic")])
def test_where_nothing_is_said_nothing_is_cropped(tmp_path, case, interpolation):
    """Kind: timm's default crop of 0.875, which no processor of transformers asks for."""
    config = loaded(saved(tmp_path, case)).module.pretrained_cfg
    assert (config["crop_pct"], config["crop_mode"], config["interpolation"]) == (1, "squash", interpolation)


def test_classes_of_processors_are_those_of_transformers():
    """Kind: a default that was guessed, and a layout with another one's processor."""
    for name, defaults in CLASSES.items():
        theirs = getattr(hf, f"{name}ImageProcessor")
        assert FILTERS[int(theirs.resample)] == defaults.interpolation
        assert theirs.default_to_square is not defaults.by_edge
        assert bool(getattr(theirs, "do_center_crop", None)) is defaults.crops
        assert not defaults.crops or theirs.crop_size == {"height": CROP_SIZE, "width": CROP_SIZE}
    mapped = hf.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    known = {name: mapped[name]["torchvision"] for name in LAYOUTS if name in mapped}
    assert len(known) > 8
    assert known == {name: f"{LAYOUTS[name].processor}ImageProcessor" for name in known}


def test_what_no_processor_says_is_told_and_a_broken_one_refused(tmp_path):
    folder = saved(tmp_path)
    told = notes(loaded(folder))
    assert "No preprocessor_config.json says mean and std, the filter, the size: mean and std are 0.5, 0.5, 0.5" in told
    assert "the filter is bilinear; pictures are resized to 32×32 whatever their shape, and nothing is cropped" in told
    write(folder, "preprocessor_config.json", **SQUARE)
    assert "preprocessor_config" not in notes(loaded(folder))
    write(folder, "preprocessor_config.json", size=None, max_num_patches=16)
    assert "No preprocessor_config.json says the size: pictures are resized" in notes(loaded(folder))
    wrongs = (
        {"resample": 17},
        {"size": {"longest_edge": 3}},
        {"do_center_crop": True, "crop_size": 33},
        {"size": {"height": 40, "width": 36}, "do_center_crop": True, "crop_size": 32},
        {"image_processor_type": "LevitImageProcessor"},
        {"image_processor_type": "OwnImageProcessor"},
    )
    for wrong in wrongs:
        write(folder, "preprocessor_config.json", **{**SQUARE, **wrong})
        with pytest.raises(ModelError, match=r"preprocessor_config\.json does not describe an image processor"):
            loaded(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_refused(tmp_path, name):
    """Kind: weights that are not those that were trained. transformers adds an adapter that lies in a model's folder."""
    folder = saved(tmp_path)
    (folder / name).write_bytes(b"{}")
    with pytest.raises(ArtifactError, match=rf"{name} beside its weights, an adapter .*merge_and_unload"):
        loaded(folder)


def test_a_processor_for_another_size_is_told(tmp_path):
    folder = saved(tmp_path)
    write(folder, "preprocessor_config.json", **{**SQUARE, "size": {"height": 48, "width": 40}})
    assert "makes images of 48×40 pixels" in notes(loaded(folder))
    assert "32×32, which is taken unless model.kwargs.img_size = [48, 40] takes the other" in notes(loaded(folder))


def test_a_size_is_suggested_where_transformers_runs_a_model_at_its_processors(tmp_path):
    """Kind: work for images that nobody makes. DINOv2's positions are for 518×518, its processor crops to 224×224."""
    dinov2, vit = saved(tmp_path / "dinov2", "DINOv2"), saved(tmp_path / "vit")
    assert Folder.open(dinov2).suggested_size is None
    for folder in (dinov2, vit):
        write(folder, "preprocessor_config.json", **{**CROPPED, "crop_size": {"height": 24, "width": 24}})
    assert Folder.open(dinov2).suggested_size == loaded(dinov2).suggested_size == (24, 24)
    assert (
        Folder.open(vit).suggested_size is loaded(vit).suggested_size is None
    )  # transformers refuses to run it at another size
    model = loaded(dinov2, kwargs={"img_size": list(Folder.open(dinov2).suggested_size)})
    assert model.family.input_size(model.module) == (3, 24, 24)


# The command line


def test_inspect_describes_a_folder(tmp_path, capsys):
    from toolchain.cli.main import main

    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(saved(tmp_path)), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["format"], facts["name"]) == ("checkpoint", "Hugging Face vit", "vit_base_patch16_224")
    assert (facts["classes"], facts["depth"], facts["kwargs"]["num_heads"]) == (5, 2, 4)


def test_every_layout_has_a_case():
    """Kind: a line in the registry that nothing holds against transformers."""
    kinds = {hf_config(case).model_type for case in CASES}
    assert set(LAYOUTS) == kinds


def hf_config(case: str) -> Any:
    _, config, values = CASES[case]
    return getattr(hf, config)(**values)


PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.2] * 3,
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ViT", "Swin", "DINOv2"])
def test_a_folder_whose_descriptions_are_damaged_is_refused_or_computes_something(tmp_path, case):
    """Kind: config.json and preprocessor_config.json as hands and other tools leave them; the end is a model or a sentence."""
    found, whole = [], saved(tmp_path / "whole", next(name for name in CASES if name.startswith(case)))
    write(whole, "preprocessor_config.json", **PROCESSOR)
    for name in ("config.json", "preprocessor_config.json"):
        content = (whole / name).read_bytes()
        for seed in range(25):
            (whole / name).write_bytes(json_damaged(content, seed))
            try:
                config = loaded(whole).module.pretrained_cfg
                Wanted((3, 32, 32), config).natural()
            except SlimvitError as error:
                found += [] if str(error).strip() else [(name, seed, "no words")]
            except Exception as error:  # noqa: BLE001 - that there is none is what is tested
                found.append((name, seed, repr(error)))
        (whole / name).write_bytes(content)
    loaded(whole)
    assert found == []


@pytest.mark.parametrize("changes", [{"rescale_factor": 0}, {"image_mean": ["x"] * 3}, {"resample": 99}])
def test_a_processor_that_prepares_nothing_is_refused(tmp_path, changes):
    folder = saved(tmp_path)
    write(folder, "preprocessor_config.json", **{**PROCESSOR, **changes})
    with pytest.raises(ModelError, match="image processor"):
        loaded(folder)
