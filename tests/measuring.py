"""Fixtures of all tests that measure, or that judge made-up samples."""

from collections.abc import Callable
from pathlib import Path

import pytest
from builders import write_samples, write_stack

from toolchain.errors import DeviceLost
from toolchain.measure.comparison import Comparison
from toolchain.measure.schedule import artifact_facts


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Sessions of an interrupted test are no business of the next."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def stack() -> Callable[..., Path]:
    return write_stack


@pytest.fixture
def made_up() -> Callable[..., Comparison]:
    return write_samples


class Stopwatch:
    """A measurer whose numbers are made up; keeps what it was asked.

    Attributes:
        noise: of the samples; much of it leaves a comparison without a verdict.
        lost: a batch at which the device drops off.
    """

    def __init__(self):
        self.asked, self.noise, self.lost = [], 0.002, None

    def __call__(self, a, b, *, target, batch, parity, affinity=None, **_):
        self.asked.append((batch, parity))
        if batch == self.lost:
            raise DeviceLost(target, "the connection failed.")
        faster = write_samples(b=-0.5, noise=self.noise)
        scenario = faster.scenario.model_copy(update={"target": target, "batch": batch})
        artifacts = {"A": artifact_facts(a), "B": artifact_facts(b)}
        return faster.model_copy(update={"scenario": scenario, "artifacts": artifacts, "parity": parity})


@pytest.fixture
def stopwatch() -> Stopwatch:
    return Stopwatch()
