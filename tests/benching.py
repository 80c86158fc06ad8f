"""What the tests of `benchmarks/` share: a tiny suite, its records, a harness with little to do, cells that take no time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import run
import torch
from engine import Harness
from kinds.base import Cell, Kind, Outcome, Table
from records import Record

from toolchain.analysis.floor import measure_floor
from toolchain.files import digest_of
from toolchain.measure.compare import compare
from toolchain.measure.samples import Design, Workload

RECORDED = Path(__file__).resolve().parent / "benchmarks" / "recorded"

TINY = """\
title = "A tiny suite"
compare = [["joint.params0.5", "vtp.params0.7"]]

[references.tiny]
seeds = [0]

[references.tiny.recipe]
model = { name = "vit_tiny_patch16_224", pretrained = false, kwargs = { img_size = 8, patch_size = 4, in_chans = 1, \
num_classes = 10, embed_dim = 32, depth = 2, num_heads = 2 } }
data = { source = "digits", calibration_images = 64 }
train = { epochs = 1, lr = 1e-3, batch_size = 64 }

[recovery]
epochs = 1
batch_size = 64

[[cells]]
name = "dense"
reference = "tiny"
settings = { "compress.method" = "none" }

[[cells]]
name = "sweep-lr"
sweep = "lr"
reference = "tiny"
training = ["recovered"]
settings = { "compress.method" = "joint", "budget.params" = 0.5 }
grid = { "finetune.lr" = [1e-5, 1e-3] }

[[cells]]
name = "joint"
reference = "tiny"
training = ["zero", "recovered"]
best = ["lr"]
settings = { "compress.method" = "joint" }
grid = { "budget.params" = [0.5] }

[[cells]]
name = "vtp"
reference = "tiny"
settings = { "compress.method" = "vtp", "compress.vtp.epochs" = 1 }
grid = { "budget.params" = [0.7] }
"""


SHORT = {"sessions": 2, "blocks": 4, "slot_ms": 1.0, "warmup_s": 0.01}
"""The least that the harness does."""
NO_MORE, DESIGN = Workload(), Design()


def changed(record: Record, definition: dict[str, Any] | None = None, **result: Any) -> Record:
    """A record with other facts in its definition or result."""
    parts = {"definition": {**record.definition, **(definition or {})}, "result": {**record.result, **result}}
    return dataclasses.replace(record, **parts)


class Short(Harness):
    """slimvit's own harness with little to do; `timed` are the names of the files, in the order in which it was asked."""

    def __init__(self, judge: Callable[[Any], Any] = lambda found: found, **fields: Any) -> None:
        measures = {"compare": self._compare, "floor": self._floor, "rate": lambda: 1e10}
        super().__init__(**{**measures, **fields})
        object.__setattr__(self, "timed", [])
        object.__setattr__(self, "judge", judge)

    def _compare(
        self, a: Path, b: Path, target: Any = "ort-cpu", workload: Any = NO_MORE, design: Any = DESIGN, **rest: Any
    ) -> Any:
        self.timed.append([a.name, b.name])
        return self.judge(compare(a, b, target, workload, design.model_copy(update={**SHORT, "looks": 1}), **rest))

    def _floor(self, a: Path, b: Path, target: Any, workload: Any, design: Any, progress: Any) -> Any:
        self.timed.append([a.name, b.name])
        return self.judge(measure_floor(a, b, target, workload, design.model_copy(update=SHORT), progress))


def carry_out(
    suite: Path, *options: str, harness: Harness | None = None, work: Path | None = None, results: Path | None = None
) -> int:
    """The exit code of a suite's run, whose work and results lie beside its file; torch has as many threads as before."""
    threads, beside = torch.get_num_threads(), suite.parent
    places = ["--work", str(work or beside / "work"), "--results", str(results or beside / "results")]
    try:
        return run.main([str(suite), *places, *options], harness or Short())
    finally:
        torch.set_num_threads(threads)


class ToyGroup(Table):
    """Cells by name, and those that all of them wait for."""

    names: tuple[str, ...]
    after: tuple[str, ...] = ()
    setting: int = 0


@dataclasses.dataclass(frozen=True)
class ToyCell(Cell):
    after: tuple[str, ...] = ()
    setting: int = 0


class Toy(Kind[ToyCell, ToyGroup]):
    """Cells that take no time: `measured` are their names, in order; those named "fails…" fail."""

    name = "toy"
    group = ToyGroup
    shared = True

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.stale: set[str] = set()
        self.missing = ""

    def cells(self, group, file, path):
        return [ToyCell(name, self.name, name, after=group.after, setting=group.setting) for name in group.names]

    def waits_for(self, cell, suite):
        return [each for each in suite.cells if each.name in cell.after]

    def unavailable(self, cell):
        return self.missing if cell.name.startswith("elsewhere") else ""

    def key(self, cell, bench, record=None):
        return digest_of(cell.name.removesuffix("-again"), cell.setting)

    def is_current(self, cell, record, bench):
        return cell.name not in self.stale

    def predict(self, todo, bench, rate):
        return {cell.name: 1800.0 for cell in todo}

    def measure(self, cell, bench, progress):
        self.measured.append(cell.name)
        if cell.name.startswith("fails"):
            raise RuntimeError("planted")
        progress.at(0.5, "half of it")
        beside = (
            {("part", "toy"): Outcome({"of": cell.name}, {"value": 2}, {"cpu": "test"})} if cell.name == "two" else {}
        )
        return Outcome({"setting": cell.setting}, {"value": 1}, {"cpu": "test"}, beside=beside)

    def definition(self, cell, other):
        return {**other, "taken": cell.name}

    def summary(self, record):
        return f"value {record.result['value']}"
