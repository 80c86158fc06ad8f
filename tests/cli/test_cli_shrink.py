"""What `slimvit shrink` and `slimvit init` do with files that lie where they write: nobody's words are lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    outcome = command("shrink", MODEL, "--data", pictures, "--out", recipe.parent)
    assert outcome.code == 74
    assert "says something else than this command: choose another --out" in outcome.err
    assert recipe.read_text(encoding="utf-8") == edited
    assert not (recipe.parent / "report.json").exists()


def test_a_draft_that_was_not_carried_out_gives_way_to_the_next(command, pictures: Path, tmp_path: Path):
    line = "shrink", MODEL, "--data", pictures, "--out", tmp_path / "run", "--set"
    for _ in range(2):  # both end before any work: the weights cannot be fetched, or the target is none
        assert command(*line, "bench.targets=['no-such']").code == 2
        recipe = (tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8")
    assert "no-such" in recipe
    assert command(*line, "bench.targets=['nor-this']").code == 2
    assert "nor-this" in (tmp_path / "run" / "recipe.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", [("--params", "0.6"), ("--macs", "50%"), ("--size", "any=5 MB")])
def test_a_limit_that_is_named_twice_is_refused(command, pictures: Path, tmp_path: Path, option: tuple[str, str]):
    key = option[0].removeprefix("--")
    line = ("shrink", MODEL, "--data", pictures, "--out", tmp_path / "run", *option)
    outcome = command(*line, "--set", f"budget.{key}=0.4")
    assert outcome.code == 2
    assert f"{option[0]} and --set budget.{key}=0.4 limit the same: leave one of them out" in outcome.err
    assert not (tmp_path / "run").exists()
