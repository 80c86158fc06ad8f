"""What timm's train.py records beside the weights, which no tensor says: it is taken, and a model that contradicts it is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from builders import TINY
from PIL import Image
from torch import nn

from toolchain.data.folders import order_notes
from toolchain.errors import ArtifactError, ModelError
from toolchain.pipeline.draft import Draft
from toolchain.recipe import ModelSection
from toolchain.surgery.candidates import architecture_of
from toolchain.surgery.load import load_dense
from toolchain.surgery.reading import read_tensors
from toolchain.surgery.trained import Trained

ARGUMENTS: dict[str, Any] = {
    "gp": None,
    "mean": None,
    "crop_pct": None,
    "interpolation": "",
    "dataset": "",
    "class_map": "",
    "img_size": None,
    "in_chans": None,
    "num_classes": 3,
}
NAME = "vit_tiny_patch16_224"
SMALL = {**TINY, "num_classes": 3}


def saved(path: Path, model: nn.Module, kwargs: dict[str, object], **arguments: object) -> Path:
    """A file as timm's train.py saves it."""
    args = argparse.Namespace(**{**ARGUMENTS, "model": NAME, "model_kwargs": kwargs, **arguments})
    torch.save({"arch": NAME, "state_dict": model.state_dict(), "args": args, "version": 2}, path)
    return path


def model_of(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**SMALL, **kwargs}).eval()


def test_whole_numbers_are_numbers(tmp_path: Path):
    """Kind: pictures that are prepared otherwise than in training. A YAML file of arguments says 0 and 1, not 0.0 and 1.0."""
    path = saved(tmp_path / "a.pth.tar", model_of(), {}, mean=[0, 0, 0], std=[1, 1, 1], crop_pct=1)
    data = Trained.of(read_tensors(path)[0]).data
    assert data == {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "crop_pct": 1.0}
    assert {type(value) for value in data["mean"]} == {float}


def test_recorded_arguments_make_the_model_that_was_trained(tmp_path: Path):
    kwargs = {**SMALL, "num_heads": 1, "drop_path_rate": 0.1}
    model = model_of(num_heads=1, global_pool="avg")
    path = saved(tmp_path / "a.pth.tar", model, kwargs, gp="avg", mean=[0.1, 0.2, 0.3], crop_pct=0.95)
    recipe = Draft.of(str(path), "digits", {}, overrides=["model.kwargs.img_size=32"]).recipe
    assert recipe.data.mean == (0.1, 0.2, 0.3)
    assert recipe.data.crop_pct == 0.95
    assert recipe.data.std is None
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_dense(recipe.model).module(image), model(image))


def test_a_model_that_computes_otherwise_with_these_weights_is_refused(tmp_path: Path):
    path = saved(tmp_path / "a.pth", model_of(num_heads=1), {**SMALL, "num_heads": 1})
    section = ModelSection(name=NAME, kwargs=SMALL, checkpoint=str(path))
    with pytest.raises(ModelError, match=r"says that it was trained as 'vit_tiny.*model\.kwargs\.num_heads = 1"):
        load_dense(section)
    load_dense(section.model_copy(update={"kwargs": {**SMALL, "num_heads": 1, "drop_rate": 0.1}}))
    features = {key: value for key, value in SMALL.items() if key != "num_classes"}
    for output in ("features", "tokens"):  # what is read may be another thing than what was trained
        load_dense(section.model_copy(update={"kwargs": features, "output": output}))


@pytest.mark.parametrize(
    "size", [(16, 64), (16, 48)]
)  # 4 patches are also those of a square image; 3 and the token are 4
def test_a_recorded_size_is_no_square_by_its_number_of_patches(tmp_path: Path, size: tuple[int, int]):
    model = model_of(img_size=size)
    path = saved(tmp_path / "a.pth", model, {**SMALL, "img_size": list(size)})
    recipe = Draft.of(str(path), "digits", {}).recipe
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(load_dense(recipe.model).module(image), model(image))


def test_the_name_decides_where_shapes_fit_several(tmp_path: Path):
    torch.save({"arch": NAME, "state_dict": timm.create_model(NAME).state_dict()}, tmp_path / "a.pth")
    assert architecture_of(tmp_path / "a.pth") == (NAME, {})
    assert architecture_of(tmp_path / "a.pth", "deit_tiny_patch16_224") == ("deit_tiny_patch16_224", {})


@pytest.mark.parametrize("arguments", [{}, {"model": "resnet50x"}, {"model": 3}, {"model_kwargs": 3, "mean": "0.5"}])
def test_arguments_of_another_script_say_nothing(tmp_path: Path, arguments: dict[str, object]):
    torch.save({"model": model_of().state_dict(), "args": argparse.Namespace(**arguments)}, tmp_path / "a.pth")
    assert Trained.of(read_tensors(tmp_path / "a.pth")[0]) == Trained()


def folders(root: Path, *names: str) -> Path:
    random = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize("names", [("1", "2", "10"), ("apple", "Bear", "cat")])
def test_folders_are_numbered_as_timm_numbered_them(tmp_path: Path, names: tuple[str, ...]):
    pictures, path = folders(tmp_path / "pictures", *names), saved(tmp_path / "a.pth", model_of(), {})
    overrides = [f"model.kwargs.{key}={value}" for key, value in SMALL.items()]
    draft = Draft.of(str(path), str(pictures), {}, name=NAME, overrides=overrides)
    assert draft.classes == {name: number for number, name in enumerate(names)}
    saved(path, model_of(), {}, dataset="torch/image_folder")
    assert Draft.of(str(path), str(pictures), {}, name=NAME, overrides=overrides).classes == {}
    (note,) = order_notes(sorted(names))
    place = next(number for number, (one, other) in enumerate(zip(names, sorted(names), strict=True)) if one != other)
    assert f"2 before 10 and without regard to case: class {place} is {names[place]!r}. If it trained the model" in note


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a wrapper holds a backbone beside a classifier."""
    return {name if name.startswith("head.") else f"backbone.{name}": tensor for name, tensor in state.items()}


def test_a_classifier_beside_the_prefix_is_one_of_the_draft(tmp_path: Path):
    torch.save(wrapped(timm.create_model("deit3_small_patch16_224", num_classes=3).state_dict()), tmp_path / "a.pth")
    assert architecture_of(tmp_path / "a.pth") == ("deit3_small_patch16_224", {"num_classes": 3})


@pytest.mark.parametrize(
    "names",
    [
        ("blocks.0.attn.qkv.lora_A.default.weight",),
        ("lora.0.weight",),
        ("blocks.0.attn.lora_qkv.weight",),
        ("head.original_module.weight",),
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_an_adapter_beside_the_weights_is_never_left_out(tmp_path: Path, names: tuple[str, ...], prefix: str):
    state = {f"{prefix}{name}": tensor for name, tensor in model_of().state_dict().items()}
    torch.save({**state, **{name: torch.zeros(4, 4) for name in names}}, tmp_path / "a.pth")
    with pytest.raises(ArtifactError, match=r"an adapter \(LoRA\) .* merge it into them"):
        architecture_of(tmp_path / "a.pth", NAME)
    with pytest.raises(ArtifactError, match=r"an adapter \(LoRA\) .* merge it into them"):
        load_dense(ModelSection(name=NAME, kwargs=SMALL, checkpoint=str(tmp_path / "a.pth")))
