"""What a run leaves as its recipe is the recipe, wherever it is read from, and what a person wrote there stays."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from toolchain.errors import StorageError
from toolchain.files import read_json, write_text
from toolchain.pipeline.folder import Workspace
from toolchain.pipeline.recipe_file import OURS, leave_recipe, remember, require_own
from toolchain.pipeline.run import run
from toolchain.recipe import Recipe

RECIPES = [
    {
        "model": {"name": "vit_tiny_patch16_224", "pretrained": False, "output": "layers", "layers": [2, 5]},
        "data": {"source": "imagefolder:pictures", "classes": "map.json", "mean": [0.5, 0.4, 0.3], "workers": 2},
        "train": {},
        "budget": {"params": 0.5, "latency": {"ort-cpu": "60%", "pi.local": "8 ms"}},
        "finetune": {"epochs": 3, "labels": False},
        "export": {"precisions": ["fp32", "int8-qdq"], "opset": 19, "accuracy_loss": 0.01},
        "engine": {"targets": ["trt-rtx"], "batch": [1, 2, 4]},
        "bench": {},
    },
    {
        "model": {"name": "local-dir:model", "resample_patches": True},
        "data": {"source": "images:~/pictures", "classes": "imagenet-12k"},
        "compress": {"method": "hybrid", "attention_share": 0.4, "neurons": "obs", "align": 16, "vtp": {"epochs": 2}},
        "budget": {"size": "12 MB"},
    },
    {
        "model": {
            "name": 'of "quotes"',
            "checkpoint": "weights é.pt",
            "kwargs": {"img_size": [64, 32], "a": {"b": 1.5}},
        },
        "data": {"source": "hf:org/pictures:extra"},
        "compress": {"method": "none"},
        "bench": {"targets": []},
    },
    {"model": {"name": "hf://org/name@v1"}, "data": {"source": "fashion-mnist"}, "budget": {"macs": 0.5}},
]


@pytest.fixture
def space(tmp_path):
    with Workspace(tmp_path / "run").open() as space:
        yield space


@pytest.mark.parametrize("raw", RECIPES)
def test_it_is_the_recipe_and_its_relative_paths_are_those_of_where_it_lay(raw, space, tmp_path):
    recipe = Recipe.from_dict(raw, base=tmp_path / "mine")
    (path,) = leave_recipe(recipe, space)
    again = Recipe.load(path)
    assert path == space.root / "recipe.toml"
    assert again.to_json() == recipe.to_json()
    assert again.digest == recipe.digest


def test_one_that_a_run_wrote_is_replaced_and_one_that_a_person_wrote_is_not(space, caplog):
    first, second = (
        Recipe.from_dict({"model": {"name": "vit_tiny_patch16_224"}, "budget": {"params": share}})
        for share in (0.5, 0.4)
    )
    (path,) = leave_recipe(first, space)
    assert leave_recipe(second, space) == [path]
    assert Recipe.load(path) == second
    write_text(path, path.read_text() + "# my own words\n")
    mine = path.read_text()
    assert leave_recipe(second, space) == [path], "it says what was carried out"
    assert path.read_text() == mine
    with caplog.at_level(logging.WARNING):
        assert leave_recipe(first, space) == []
    assert path.read_text() == mine
    assert "is not the recipe that was carried out, and is left as it is; remove it" in caplog.text
    path.unlink()
    assert leave_recipe(first, space) == [path]
    assert Recipe.load(path) == first


def test_a_folder_that_none_named_is_of_one_recipe_file(tmp_path, monkeypatch):
    """Kind: two projects whose folders have one name, and one run in place of the other."""
    monkeypatch.chdir(tmp_path)
    ours, theirs, folder = Path("a/net/recipe.toml"), Path("b/net/recipe.toml"), Path("runs/net")
    for each in (ours, theirs):
        each.parent.mkdir(parents=True)
        each.touch()
    require_own(ours, folder)
    with Workspace(folder).open() as space:
        remember(ours, space)
    require_own(ours, folder)
    require_own(tmp_path / ours, folder)
    require_own(folder / "recipe.toml", folder)
    command = (
        r"`slimvit run b/net/recipe.toml --out DIR` takes a folder of its own, and --out runs/net goes on in that one"
    )
    with pytest.raises(StorageError, match=rf"runs/net holds the run of another recipe, {tmp_path / ours}: {command}"):
        require_own(theirs, folder)
    with Workspace(folder).open() as space:
        remember(folder / "recipe.toml", space)
    with pytest.raises(StorageError, match="another recipe"):
        require_own(theirs, folder)
    require_own(ours, folder)
    with Workspace(folder).open() as space:
        remember(theirs, space)
    require_own(theirs, folder)
    theirs.unlink()
    require_own(ours, folder)


def test_a_recipe_that_moves_with_its_runs_or_is_a_link_to_another_one_by_one_stays_the_same(tmp_path):
    place, versions = tmp_path / "project" / "net", (tmp_path / "v1.toml", tmp_path / "v2.toml")
    for each in versions:
        each.touch()
    place.mkdir(parents=True)
    (place / "recipe.toml").symlink_to(versions[0])
    with Workspace(tmp_path / "project" / "runs").open() as space:
        remember(place / "recipe.toml", space)
    (place / "recipe.toml").unlink()
    (place / "recipe.toml").symlink_to(versions[1])
    moved = (tmp_path / "project").rename(tmp_path / "moved")
    require_own(moved / "net" / "recipe.toml", moved / "runs")


@pytest.mark.parametrize("text", ["[model", "", "[model]\nname = 3\n"])
def test_what_is_no_recipe_is_a_persons_as_well(space, text):
    write_text(space.root / "recipe.toml", text)
    assert leave_recipe(Recipe.from_dict(RECIPES[3]), space) == []
    assert (space.root / "recipe.toml").read_text() == text


@pytest.mark.parametrize("value", [None, [1, None], {"a": None}])
def test_what_toml_cannot_say_is_not_written(space, value):
    plain = Recipe.from_dict({"model": {"name": "vit_tiny_patch16_224"}, "budget": {"params": 0.5}})
    (path,) = leave_recipe(plain, space)
    model = plain.model.model_copy(update={"kwargs": {"x": value}})
    assert leave_recipe(plain.model_copy(update={"model": model}), space) == []
    assert not path.exists()
    assert (space.private / OURS).exists()


@pytest.mark.slow
def test_a_run_is_repeated_from_what_it_left(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "mine").mkdir()
    write_text(
        tmp_path / "mine" / "recipe.toml",
        '[model]\nname = "vit_tiny_patch16_224"\npretrained = false\n'
        "kwargs = { img_size = 8, patch_size = 2, in_chans = 1, num_classes = 10, embed_dim = 32, depth = 2, num_heads = 2 }\n"
        '[data]\nsource = "none"\n[budget]\nparams = 0.9\n',
    )
    recipe = Recipe.load(tmp_path / "mine" / "recipe.toml", ["budget.params=0.6"])
    first = run(recipe, tmp_path / "first")
    left = tmp_path / "first" / "recipe.toml"
    second = run(left, tmp_path / "second")
    assert second.recipe_digest == first.recipe_digest
    plans = [(tmp_path / name / "plan.json").read_bytes() for name in ("first", "second")]
    assert plans[0] == plans[1]
    assert left.read_bytes() == (tmp_path / "second" / "recipe.toml").read_bytes()
    listed = {each["path"] for each in read_json(tmp_path / "first" / "manifest.json")["files"]}
    assert "recipe.toml" in listed
    assert "recipe.toml" in {each.path for each in first.files}
    before = left.read_bytes(), left.stat().st_mtime_ns
    run(left, tmp_path / "first")
    assert (left.read_bytes(), left.stat().st_mtime_ns) == before


def test_a_class_map_in_the_runs_folder_moves_with_it(tmp_path):
    raw = {**RECIPES[3], "data": {"source": "imagefolder:pictures", "classes": "run/classes.json"}}
    with Workspace(tmp_path / "run").open() as space:
        leave_recipe(recipe := Recipe.from_dict(raw, base=tmp_path), space)
        assert Recipe.load(space.root / "recipe.toml").to_json() == recipe.to_json()
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    again = Recipe.load(moved / "recipe.toml")
    assert again.data.classes == str(moved / "classes.json"), "another run may lie where it was"
    assert again.data.source == recipe.data.source
    assert again.digest == recipe.digest
