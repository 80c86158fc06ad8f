"""What `slimvit init` and `slimvit shrink` make of a model and a folder of pictures."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from toolchain.errors import DataError, ModelError, StorageError
from toolchain.pipeline.draft import Draft, model_keys, source_of
from toolchain.recipe import Recipe
from toolchain.surgery.candidates import architecture_of

HALF = {"params": 0.5}


@pytest.fixture
def folder(tmp_path: Path):
    """Makes a folder of pictures: in that many class folders, or flat."""

    def make(classes: int) -> Path:
        rng, root = np.random.default_rng(0), tmp_path / "pictures"
        for name in [f"class{index}" for index in range(classes)] or ["."]:
            (root / name).mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{index}.png")
        return root

    return make


def test_a_draft_is_a_recipe_that_says_the_same(folder, tmp_path: Path):
    draft = Draft.of("vit_tiny_patch16_224", str(folder(0)), HALF, overrides=["budget.latency.ort-cpu=45%"])
    text = draft.text()
    assert text.startswith("#:schema ./recipe.schema.json\n")
    assert "5.7 M parameters" in text
    (tmp_path / "recipe.toml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.toml") == draft.recipe
    assert draft.recipe.budget.latency == {"ort-cpu": "45%"}
    assert tomllib.loads(text)["budget"]["params"] == 0.5


@pytest.mark.parametrize(
    ("classes", "of_model", "kind"), [(3, 3, "imagefolder"), (3, 0, "imagefolder"), (3, 7, "images")]
)
def test_labels_are_read_where_they_can_judge_the_model(folder, classes: int, of_model: int, kind: str):
    source, remark = source_of(str(folder(classes)), of_model)
    assert source.partition(":")[0] == kind
    assert remark


def test_a_flat_folder_has_no_labels(folder):
    assert source_of(str(folder(0)), 1000)[0].startswith("images:")


def test_a_source_stays_as_it_is_and_a_missing_folder_is_refused():
    assert source_of("digits", 10) == ("digits", "")
    with pytest.raises(DataError, match="no folder"):
        source_of("no/such/place", 10)


def test_names_hubs_files_and_folders_are_told_apart(tmp_path: Path):
    assert model_keys("vit_tiny_patch16_224") == {"name": "vit_tiny_patch16_224"}
    assert model_keys("timm/vit_tiny") == {"name": "hf-hub:timm/vit_tiny"}
    assert model_keys("hf-hub:timm/vit_tiny") == {"name": "hf-hub:timm/vit_tiny"}
    (tmp_path / "a.pth").write_bytes(b"")
    assert model_keys(str(tmp_path / "a.pth"), "deit_tiny_patch16_224")["checkpoint"] == str(tmp_path / "a.pth")
    for text, raw in (("local-dir:", {"architecture": "x"}), ("", {"model_type": "dinov2"})):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert model_keys(str(tmp_path)) in ({"name": f"{text}{tmp_path}"}, {"checkpoint": str(tmp_path)})


@pytest.mark.parametrize("model", ["weights.pth", "no/such/folder/of/mine", "./nothing"])
def test_what_is_not_there_is_said(model: str):
    with pytest.raises(StorageError, match="there is no"):
        model_keys(model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="holds no model"):
        model_keys(str(tmp_path))


def test_a_checkpoint_tells_its_architecture(tmp_path: Path):
    model = timm.create_model("deit3_small_patch16_224", num_classes=5)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "a.pth")
    assert architecture_of(tmp_path / "a.pth") == "deit3_small_patch16_224"


def test_shapes_that_fit_several_are_not_guessed_at(tmp_path: Path):
    torch.save(timm.create_model("vit_base_patch16_224").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"deit_base_patch16_224.*vit_base_patch16_224.*--model"):
        architecture_of(tmp_path / "a.pth")
