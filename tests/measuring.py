"""What all tests share that measure, or that judge made-up samples: fixtures, a scripted device, and who is told."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import few_sessions, write_samples, write_stack

from toolchain.cost import trace
from toolchain.devices.device import Device
from toolchain.errors import DeviceLost, WorkloadRefused
from toolchain.gate.timing import Pair
from toolchain.measure.comparison import Comparison
from toolchain.measure.experiment import artifact_facts
from toolchain.on_device.runner import SESSION_SCHEMA, block_orders
from toolchain.pipeline import latency_budget
from toolchain.progress import Nobody, Progress
from toolchain.targets.ort import OrtCpu


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


@pytest.fixture
def widths_timed(monkeypatch) -> Callable[..., list[int]]:
    """Lets widths take shares of 2 ms that follow from shares of MACs by a rule of (share, design); lists how many were timed."""

    def by(rule=lambda share, _: share):
        timed = []

        def measure(dense, variants, setting, design, progress):
            timed.append(len(variants))
            shape = trace(dense.module, dense.family, dense.preprocess.input_size)
            shares = [shape.shrunk(widths, dense.groups).macs / shape.macs for widths in variants]
            return latency_budget.Timing(2.0, tuple(rule(share, design) for share in shares), {"cpu": "made up"})

        monkeypatch.setattr(latency_budget, "time_widths", measure)
        return timed

    return by


class Listener(Nobody):
    """Calls `tell(share, text)` with every report."""

    def __init__(self, tell):
        self.tell = tell

    def at(self, share, text):
        self.tell(share, text)


def progress_to(tell):
    return Progress(Listener(tell))


class Scripted:
    """A measurer that measures nothing: each slot takes what `truth` says of (variant, session, block), as ln of 10 ms."""

    def __init__(self, truth=lambda *_: 0.0, noise=0.003, seed=0):
        self.truth, self.noise, self.asked, self.schedules = truth, noise, [], []
        self.rng = np.random.default_rng(seed)
        self.machine = {"cpu": "scripted", "threads": 1, "affinity": [0], "runtimes": {"onnxruntime": "1"}}

    def run(self, schedule, progress):
        session = schedule["session"]
        self.schedules.append(schedule)
        self.asked.append((session, schedule["blocks"]))
        names = [variant["name"] for variant in schedule["variants"]]
        fingerprint = {"machine": {**self.machine, "threads": schedule["threads"]}, "state": {}}
        facts = {"outputs": [[4, 96]], "warmup_calls": 10, "warmup_seconds": 1.0, "call_ns": 1e6}
        blocks = [
            {"order": order, "samples_ns": {name: self.slot(name, session, index) for name in order}}
            for index, order in enumerate(block_orders(names, schedule["blocks"], schedule["seed"], session))
        ]
        progress.at(1.0, f"block {len(blocks)}/{len(blocks)}")
        return {
            "schema": SESSION_SCHEMA,
            "session": session,
            "fingerprint": {"before": fingerprint, "after": fingerprint},
            "variants": {name: {**facts, "calls_per_slot": 6, "discarded": 1} for name in names},
            "blocks": blocks,
        }

    def slot(self, name, session, block):
        level = self.truth(name, session, block)
        return [round(1e7 * math.exp(level + self.noise * self.rng.standard_normal())) for _ in range(5)]


def device_of(measurer, runtime="ort-cpu"):
    return Device(runtime, runtime, measurer)


class Updated(OrtCpu):
    """The same runtime in another version."""

    def probe(self):
        return replace(super().probe(), version="another")


class Stopwatch:
    """A measurer whose numbers are made up; keeps what it was asked.

    Attributes:
        noise: of the samples; much of it leaves a comparison without a verdict.
        lost: a batch at which the device drops off.
        refused: a number of threads that the device has not.
    """

    def __init__(self):
        self.asked, self.noise, self.lost, self.refused = [], 0.002, None, None

    def __call__(self, a, b, device, workload, *_, parity, **__):
        self.asked.append((workload.batch, parity))
        if workload.batch == self.lost:
            raise DeviceLost(device.runtime, "the connection failed.")
        if workload.threads == self.refused:
            raise WorkloadRefused(device.name, f"{workload.threads} threads are more than there are cores")
        faster = write_samples(b=-0.5, noise=self.noise)
        scenario = faster.scenario.model_copy(update={"target": device.runtime, "batch": workload.batch})
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


class GateScript:
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
