"""A suite so small that it runs in seconds, its records, and the threads that a run changes put back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from benching import RECORDED, TINY, Toy, carry_out
from builders import dense_model
from experiments.starts import Start
from kinds import KINDS
from kinds.compression import evaluated
from measuring import made_up, own_cache
from records import Results
from safetensors.torch import save_file
from suite import Suite

from toolchain.pipeline.job import prepare
from toolchain.recipe import Recipe

__all__ = ["made_up", "own_cache"]


DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
"""The architecture of a tiny model."""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def suite_file(tmp_path) -> Path:
    """The tiny suite in a file of its own."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def suite(suite_file) -> Suite:
    """The tiny suite."""
    return Suite.load(suite_file)


@pytest.fixture
def results(tmp_path) -> Results:
    """The records of the tiny suite as they were measured once, in a folder that a test may change."""
    return Results(Path(shutil.copytree(RECORDED, tmp_path / "results")))


@pytest.fixture(scope="session")
def measured(tmp_path_factory) -> Path:
    """A folder in which the tiny suite is measured now: tiny.toml, results/, work/."""
    root = tmp_path_factory.mktemp("suite")
    (root / "tiny.toml").write_text(TINY)
    assert carry_out(root / "tiny.toml") == 0
    return root


@pytest.fixture
def copied(measured, tmp_path) -> Path:
    """A copy of the measured folder that a test may change."""
    return Path(shutil.copytree(measured, tmp_path / "copy"))


@pytest.fixture
def toy():
    """The toy kind, registered as long as the test lasts."""
    yield KINDS.add(kind := Toy())
    KINDS.discard(kind.name)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A tiny model on digits, as experiments begin with one."""
    weights = tmp_path_factory.mktemp("dense") / "model.safetensors"
    save_file(dense_model(**DIGITS).module.state_dict(), weights)
    recipe = {
        "model": {"name": "vit_tiny_patch16_224", "checkpoint": str(weights), "pretrained": False, "kwargs": DIGITS},
        "data": {"source": "digits", "calibration_images": 64},
        "compress": {"method": "joint", "align": 1, "allocation": "uniform", "sensitivity": False},
        "budget": {"params": 0.5},
    }
    job = prepare(Recipe.from_dict(recipe))
    train = job.source.splits["train"]
    train.positions = train.positions[:128]
    return Start("tiny", job, "weights", lambda module: evaluated(module, job.dense.module, job.source))
