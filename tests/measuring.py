"""Fixtures of all tests that measure, or that judge made-up samples."""

from collections.abc import Callable
from pathlib import Path

import pytest
from builders import few_sessions, write_samples, write_stack

from toolchain.devices.device import Device
from toolchain.errors import DeviceLost
from toolchain.gate.timing import Pair
from toolchain.measure.comparison import Comparison
from toolchain.measure.schedule import artifact_facts
from toolchain.progress import Progress


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


def as_measured(pair: Pair, **truth: object) -> Comparison:
    """Made-up samples, as if a pair of a gate had been timed; keywords as of `builders.write_samples`."""
    design = truth.pop("design", None) or few_sessions()
    design, cell = design.model_copy(update={"tau": pair.tau, "seed": pair.seed}), pair.cell
    made_up = write_samples(**truth, design=design, threads=cell.threads or 1, affinity=cell.affinity or (0,))
    scenario = {"batch": cell.batch, "affinity": cell.affinity}
    artifacts = {"A": artifact_facts(pair.baseline), "B": artifact_facts(pair.artifact)}
    update = {
        "scenario": made_up.scenario.model_copy(update=scenario),
        "artifacts": artifacts,
        "parity": pair.parity,
    }
    return made_up.model_copy(update=update)


class Scripted:
    """Measures for a gate by a script: each entry is the truth of made-up samples, or an error; keeps what it was asked."""

    def __init__(self, *script: dict | Exception) -> None:
        self.script = list(script)
        self.pairs: list[Pair] = []
        self.devices: list[Device] = []

    def __call__(self, pair: Pair, device: Device, progress: Progress) -> Comparison:
        self.pairs.append(pair)
        self.devices.append(device)
        entry = self.script.pop(0)
        if isinstance(entry, Exception):
            raise entry
        return as_measured(pair, **entry)
