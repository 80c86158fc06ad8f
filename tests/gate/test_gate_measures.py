"""A gate that measures with real sessions, as short as they go: no verdict is asserted, the machine may be busy."""

from __future__ import annotations

import datetime as dt
from functools import partial

import pytest
from builders import write_classifier

from toolchain.artifacts import open_artifact
from toolchain.devices.device import Devices
from toolchain.gate import GateConfig, run_gate
from toolchain.gate.timing import Clock, timed
from toolchain.measure.samples import Design
from toolchain.progress import Nobody, Progress

pytestmark = pytest.mark.clock

TODAY = dt.date(2030, 1, 15)


class Reader(Nobody):
    """Reads what a gate tells, and interrupts it at some words."""

    def __init__(self, until=None):
        self.texts, self.until = [], until

    def at(self, share, text):
        self.texts.append(text)
        if self.until is not None and self.until in text:
            raise KeyboardInterrupt


def test_real_measurements_reach_the_result(tmp_path, stack):
    old, _ = stack(tmp_path / "old.onnx", layers=2), stack(tmp_path / "new.onnx", layers=40)
    raw = {
        "baseline": {"old": {"path": "old.onnx", "sha256": open_artifact(old).sha256}},
        "cell": [{"name": "a", "artifact": "new.onnx", "baseline": "old", "relation": {"latency": 0.05}}],
    }
    reader, short = Reader(), partial(timed, design=Design(sessions=1, blocks=4, slot_ms=1.0, warmup_s=0.01, looks=1))
    config = GateConfig.from_dict(raw, tmp_path)
    result = run_gate(config, tool="test", day=TODAY, clock=Clock(short), progress=Progress(reader))
    (check,) = result.cells[0].checks
    assert check.value > 1.5, "forty matmuls take longer than two"
    assert check.status in ("fail", "invalid", "inconclusive")
    assert result.cells[0].comparisons[0].design.blocks == 4
    assert reader.texts[0].startswith("a, session 1: ")


def test_a_gate_that_is_cut_off_measures_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    old = write_classifier(tmp_path / "old.onnx")
    cell = {"artifact": "old.onnx", "baseline": "old", "relation": {"latency": 0.05}}
    raw = {
        "baseline": {"old": {"path": "old.onnx", "sha256": open_artifact(old).sha256}},
        "cell": [{"name": f"cell{batch}", "batch": batch, **cell} for batch in (1, 2)],
    }
    config = GateConfig.from_dict(raw, tmp_path)
    short = partial(timed, design=Design(sessions=3, blocks=4, slot_ms=1.0, warmup_s=0.01, looks=1))

    def judge(until=None):
        reader = Reader(until)
        with Devices() as devices:
            progress = Progress(reader)
            return reader, run_gate(
                config, tool="test", day=TODAY, devices=devices, clock=Clock(short), progress=progress
            )

    with pytest.raises(KeyboardInterrupt):
        judge(until="cell2, session 2")
    reader, result = judge()
    kept = [text for text in reader.texts if "finished by an earlier run" in text]
    assert kept == [
        *(f"cell1, session {number}: finished by an earlier run" for number in (1, 2, 3)),
        "cell2, session 1: finished by an earlier run",
    ]
    assert all(cell.comparisons for cell in result.cells)
    assert not list((tmp_path / "cache" / "sessions").iterdir()), "what ended is measured afresh next time"
