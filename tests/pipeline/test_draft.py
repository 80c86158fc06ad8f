"""What `slimvit init` and `slimvit shrink` make of a model and a folder of pictures."""

from __future__ import annotations

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from builders import TINY, dense_model
from PIL import Image

from toolchain.cli.init import write_recipe
from toolchain.data.sources import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, ModelError, StorageError
from toolchain.pipeline.draft import Draft, pictures_of, tables_of
from toolchain.pipeline.job import prepare
from toolchain.recipe import Recipe
from toolchain.surgery.candidates import architecture_of
from toolchain.surgery.replay import save_model

transformers = pytest.importorskip("transformers", reason="the folder is one that transformers saves")
HALF = {"params": 0.5}


@pytest.fixture
def folder(tmp_path: Path):
    """Makes a folder of pictures: in that many class folders, or flat."""

    def make(classes: int) -> Path:
        rng, root = np.random.default_rng(0), tmp_path / "pictures"
        for name in [f"class{index}" for index in range(classes)] or ["."]:
            (root / name).mkdir(parents=True, exist_ok=True)
            for index in range(4):
                pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / f"{index}.png")
        return root

    return make


def test_a_draft_is_a_recipe_that_says_the_same(folder, tmp_path: Path):
    draft = Draft.of("vit_tiny_patch16_224", str(folder(0)), HALF, overrides=["budget.latency.ort-cpu=45%"])
    text = draft.text(tmp_path)
    assert text.startswith("#:schema ./recipe.schema.json\n")
    assert "5.7 M parameters" in text
    (tmp_path / "recipe.toml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.toml") == draft.recipe
    assert draft.recipe.budget.latency == {"ort-cpu": "45%"}
    assert tomllib.loads(text)["budget"]["params"] == 0.5


@pytest.mark.parametrize(("classes", "of_model", "kind"), [(3, 3, "imagefolder"), (3, 0, "images"), (3, 7, "images")])
def test_labels_are_read_where_they_can_judge_the_model(folder, classes: int, of_model: int, kind: str, caplog):
    pictures = pictures_of(str(folder(classes)), of_model)
    assert pictures.source.partition(":")[0] == kind
    assert pictures.remark
    assert ("labels are not read, so the files are judged without them" in caplog.text) == (of_model == 7)


def test_albums_are_no_classes_for_a_model_without_any(folder, tmp_path: Path):
    albums = folder(2)
    for index in range(9):
        Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(albums / f"{index}.png")
    pictures = pictures_of(str(albums), 0)
    assert pictures.source == f"images:{albums.resolve()}"
    assert "imagefolder:" in pictures.remark
    source = open_source(pictures.source, Wanted((3, 16, 16), {"mean": (0.5,) * 3, "std": (0.5,) * 3}))
    assert sum(len(source.split(name)) for name in ("train", "validation", "test")) == 17
    for split in ("train", "val"):
        shutil.copytree(folder(2), tmp_path / "sorted" / split)
    assert pictures_of(str(tmp_path / "sorted"), 0).source.startswith("imagefolder:")
    (tmp_path / "sorted" / "val" / "more").mkdir()
    assert pictures_of(str(tmp_path / "sorted"), 0).source.startswith("images:")


@pytest.mark.parametrize(
    ("names", "kind", "numbers"),
    [
        (("class0", "class1", "class2"), "imagefolder", {}),
        (("class2", "class0", "class1"), "imagefolder", {"class2": 0, "class0": 1, "class1": 2}),
        (("oak", "ash", "maple"), "images", {}),
    ],
)
def test_folders_are_numbered_as_the_model_names_its_classes(folder, names, kind: str, numbers: dict[str, int]):
    pictures = pictures_of(str(folder(3)), 3, names)
    assert pictures.source.partition(":")[0] == kind
    assert pictures.numbers == numbers


def test_a_class_map_lies_beside_the_recipe(folder, tmp_path: Path):
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
        id2label={0: "class1", 1: "class0"},
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    draft = Draft.of(str(tmp_path / "vit"), str(folder(2)), {"params": 0.9}, beside=tmp_path / "run")
    write_recipe(draft, tmp_path / "run" / "recipe.toml")
    job = prepare(Recipe.load(tmp_path / "run" / "recipe.toml"))
    assert job.source.labelled
    first = job.source.split("test").positions[0]
    assert int(job.source.split("test").labels[0]) == (1 if first < 4 else 0)
    write_recipe(draft, tmp_path / "run" / "recipe.toml")  # what is there already may be written again
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert Recipe.load(moved / "recipe.toml").data.classes == str(moved / "classes.json"), (
        "another run may lie where it was"
    )
    moved.rename(tmp_path / "run")
    own = tmp_path / "run" / "classes.json"
    own.write_text('{"mine": 0}')
    with pytest.raises(StorageError, match=r"classes\.json maps classes in another way"):
        write_recipe(draft, tmp_path / "run" / "other.toml")
    assert own.read_text() == '{"mine": 0}'
    assert not (tmp_path / "run" / "other.toml").exists()


def test_a_flat_folder_has_no_labels(folder):
    assert pictures_of(str(folder(0)), 1000).source.startswith("images:")


def test_a_source_stays_as_it_is_and_a_missing_folder_is_refused():
    assert pictures_of("digits", 10).source == "digits"
    with pytest.raises(DataError, match="no folder"):
        pictures_of("no/such/place", 10)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224"),
        ("timm/vit_tiny", "hf-hub:timm/vit_tiny"),
        ("hf-hub:timm/vit_tiny", "hf-hub:timm/vit_tiny"),
        ("hf://timm/vit_tiny@v1", "hf://timm/vit_tiny@v1"),
    ],
)
def test_names_are_those_of_timm_or_of_a_hub(model: str, name: str):
    assert tables_of(model)["model"] == {"name": name}
    with pytest.raises(ModelError, match="--model goes with a checkpoint"):
        tables_of(model, "vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [({"architecture": "x"}, "name", "local-dir:{}"), ({"model_type": "dinov2"}, "checkpoint", "{}")],
)
def test_a_folder_is_of_timm_or_of_transformers(tmp_path: Path, config: dict[str, str], key: str, value: str):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tables_of(str(tmp_path))["model"] == {key: value.format(tmp_path)}


def test_a_damaged_config_is_said(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        tables_of(str(tmp_path))


def test_the_dense_model_of_a_run_keeps_its_outputs_and_preprocessing(folder, tmp_path: Path):
    dense = dense_model(**{**TINY, "num_classes": 3})
    how = replace(dense.preprocess, mean=(0.1, 0.2, 0.3), crop_pct=0.5, interpolation="box", crop_mode="squash")
    model = replace(dense, ref=dense.ref.model_copy(update={"output": "multi-label"}), preprocess=how)
    place = save_model(model, tmp_path / "dense")
    draft = Draft.of(str(place), str(folder(0)), HALF)
    assert draft.recipe.model.output == "multi-label"
    assert draft.recipe.data.mean == (0.1, 0.2, 0.3)
    data = draft.recipe.data
    assert (data.crop_pct, data.interpolation, data.crop_mode) == (0.5, "box", "squash")


def test_paths_mean_the_same_wherever_the_recipe_lies(folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder(0)
    monkeypatch.chdir(tmp_path)
    draft = Draft.of("vit_tiny_patch16_224", "images:pictures", {})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/recipe.toml").write_text(draft.text(tmp_path))
    assert Recipe.load(tmp_path / "elsewhere/recipe.toml") == draft.recipe
    assert draft.recipe.data.source == f"images:{tmp_path}/pictures"


def test_another_budget_takes_the_place_of_half_of_the_parameters(folder):
    draft = Draft.of("vit_tiny_patch16_224", str(folder(0)), {}, overrides=["budget.latency.ort-cpu=45%"])
    assert draft.recipe.budget.params is None
    assert Draft.of("vit_tiny_patch16_224", str(folder(0)), {}).recipe.budget.params == 0.5


@pytest.mark.parametrize("model", ["weights.pth", "no/such/folder/of/mine", "./nothing"])
def test_what_is_not_there_is_said(model: str):
    with pytest.raises(StorageError, match="there is no"):
        tables_of(model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match="holds no model"):
        tables_of(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", r"an adapter of peft: merge it"),
        ("dense/model.json", r"that of a run, whose dense model is .*dense"),
        ("model_best.pth.tar", r"name a file in it: model_best\.pth\.tar"),
    ],
)
def test_a_folder_of_another_kind_is_told_what_to_do(tmp_path: Path, file: str, message: str):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        tables_of(str(tmp_path))


def test_a_path_that_is_not_there_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"no file or folder runs/mine, .* hub write hf://runs/mine"):
        tables_of("runs/mine")
    with pytest.raises(StorageError, match=r"no file or folder best\.pth\.tar, .* give a checkpoint"):
        tables_of("best.pth.tar")
    assert tables_of("org/name")["model"] == {"name": "hf-hub:org/name"}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("deit3_small_patch16_224", {"num_classes": 5, "img_size": 288}),
        # Its first convolution is not that of its patches.
        pytest.param("vit_tiny_r_s16_p8_224", {"num_classes": 5}, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_tells_its_architecture(tmp_path: Path, name: str, kwargs: dict[str, int]):
    state = timm.create_model(name, **kwargs).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    assert architecture_of(tmp_path / "a.pth") == (name, kwargs)
    assert architecture_of(tmp_path / "a.pth", name) == (name, kwargs)


def test_a_checkpoint_with_classes_of_its_own_is_judged_by_as_many_folders(folder, tmp_path: Path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "a.pth")
    draft = Draft.of(str(tmp_path / "a.pth"), str(folder(3)), HALF, name="vit_tiny_patch16_224")
    assert draft.recipe.data.source.startswith("imagefolder:")
    assert prepare(draft.recipe).dense.label_classes == 3


def test_shapes_that_fit_several_are_not_guessed_at(tmp_path: Path):
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"deit_tiny_patch16_224.*vit_tiny_patch16_224.*--model"):
        architecture_of(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("size", "overrides", "precisions"),
    [
        ("45%", (), ["fp32"]),
        ({"int4": "3 MB"}, (), ["fp32", "int4"]),
        ({"any": "3 MB"}, (), ["fp32", "fp16", "int8-dynamic", "int4"]),
        ({"any": "3 MB"}, ("export.precisions=['int8','int4']",), ["int8", "int4"]),
        (None, ("budget.size.fp16=3 MB",), ["fp32", "fp16"]),
    ],
)
def test_the_files_that_a_budget_speaks_of_are_made(folder, size, overrides, precisions):
    budget = {} if size is None else {"size": size}
    draft = Draft.of("vit_tiny_patch16_224", str(folder(0)), budget, overrides=overrides)
    assert list(draft.recipe.export.precisions) == precisions
    assert Recipe.from_dict(tomllib.loads(draft.text(Path()))) == draft.recipe
