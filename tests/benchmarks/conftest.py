"""A suite so small that it runs in seconds, its records, and the threads that a run changes put back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from benching import RECORDED, TINY, Toy, carry_out
from kinds import KINDS
from measuring import made_up, own_cache
from records import Results
from suite import Suite

__all__ = ["made_up", "own_cache"]


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
