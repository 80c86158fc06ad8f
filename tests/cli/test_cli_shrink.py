"""What `slimvit shrink` and `slimvit init` do with files that lie where they write: nobody's words are lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolchain.cli.shrink import _recipe_in
from toolchain.pipeline.draft import CLASSES_FILE, Draft
from toolchain.pipeline.folder import Workspace
from toolchain.pipeline.recipe_file import claim

MODEL = "vit_tiny_patch16_224"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures without labels."""
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_a_recipe_that_a_person_wrote_is_not_replaced(command, pictures: Path, tmp_path: Path):
    recipe = tmp_path / "run" / "recipe.toml"
    assert command("init", MODEL, "--data", pictures, "--out", recipe).code == 0
    edited = recipe.read_text(encoding="utf-8").replace("params = 0.5", "params = 0.45 # what the app needs")
    assert "0.45" in edited
    recipe.write_text(edited, encoding="utf-8")
    for dry in ([], ["--dry-run"]):
        outcome = command("shrink", MODEL, "--data", pictures, "--out", recipe.parent, *dry)
        assert (outcome.code, outcome.out) == (74, "")
        assert "says something else than this command: choose another --out" in outcome.err
        assert recipe.read_text(encoding="utf-8") == edited
        assert not (recipe.parent / "report.json").exists()


def test_a_failure_before_any_work_leaves_nothing_that_the_next_try_meets(command, pictures: Path, tmp_path: Path):
    folder = tmp_path / "run"
    line = "shrink", MODEL, "--data", pictures, "--out", folder, "--set", "bench.targets=['no-such']"
    assert command(*line).code == 2  # before any work: the weights cannot be fetched, or the target is none
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes.txt").write_text("of a person", encoding="utf-8")
    assert command(*line).code == 2
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]


def test_the_recipe_of_a_run_under_way_stays(command, pictures: Path, tmp_path: Path):
    recipe = tmp_path / "run" / "recipe.toml"
    assert command("init", MODEL, "--data", pictures, "--out", recipe).code == 0
    before = recipe.read_bytes()
    claim(Workspace(recipe.parent))
    with Workspace(recipe.parent).open():  # as in its first stage
        outcome = command("shrink", MODEL, "--data", pictures, "--params", "0.7", "--out", recipe.parent)
    assert outcome.code == 74
    assert "another run is writing to" in outcome.err
    assert recipe.read_bytes() == before


def test_a_draft_that_was_not_carried_out_gives_way_to_the_next(command, pictures: Path, tmp_path: Path):
    folder = tmp_path / "run"
    recipe = folder / "recipe.toml"
    assert command("init", MODEL, "--data", pictures, "--out", recipe).code == 0
    claim(Workspace(folder))  # as if shrink had been killed before its first stage
    line = "shrink", MODEL, "--data", pictures, "--out", folder
    assert command(*line, "--set", "bench.targets=['nor-this']").code == 2
    assert "nor-this" in recipe.read_text(encoding="utf-8")


@pytest.mark.parametrize("option", [("--params", "0.6"), ("--macs", "50%"), ("--size", "any=5 MB")])
def test_a_limit_that_is_named_twice_is_refused(command, pictures: Path, tmp_path: Path, option: tuple[str, str]):
    key = option[0].removeprefix("--")
    line = ("shrink", MODEL, "--data", pictures, "--out", tmp_path / "run", *option)
    outcome = command(*line, "--set", f"budget.{key}=0.4")
    assert outcome.code == 2
    assert f"{option[0]} and --set budget.{key}=0.4 limit the same: leave one of them out" in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_class_map_moves_with_the_recipe_that_it_lies_beside(tmp_path: Path):
    def drafted(folder: Path) -> Draft:
        data = {"source": "digits", "classes": str(folder / CLASSES_FILE)}
        return Draft({"model": {"name": MODEL}, "budget": {"params": 0.5}, "data": data}, {}, {"b": 0, "a": 1})

    assert _recipe_in(tmp_path / "run", drafted(tmp_path / "scratch")) == drafted(tmp_path / "run").recipe
