"""One trial of the latency protocol: two files of known depth compared, and the medians of its slots kept.

Stacks of one block differ in their depth alone, so it is known whether one is slower than the other, and by how much.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import timm
from bursts import load
from pydantic import Field
from records import Record, versions

from kinds.base import Cell, Kind, Outcome, Table
from toolchain.export.onnx_graph import export_onnx
from toolchain.files import digest_of
from toolchain.measure.comparison import judge
from toolchain.measure.environment import cores_of_others
from toolchain.measure.intervals import bootstrap_medians, percentile_interval, slot_medians
from toolchain.measure.samples import CONTROL, SESSIONS, VARIANTS, A, B, Design
from toolchain.progress import Progress
from toolchain.surgery.load import randomise_untrained
from toolchain.version import tool

if TYPE_CHECKING:
    from engine import Bench
    from suite import File

SHAPE = {"img_size": 28, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 128, "num_heads": 4}
TAU, ALPHA = 0.05, 0.05
SECONDS = 26.0
"""What one comparison is predicted to take until some are recorded: six sessions of warm-up and 12 blocks."""


class Group(Table):
    """Comparisons of one pair of depths, often.

    Attributes:
        name: of the experiment, and of its row.
        depths: blocks of A and of B: a call's time grows with their number, but for the patch embedding and the head.
        count: comparisons.
        loaded: whether another process works now and then beside them.
        wanted: what the protocol is to say, in words.
    """

    name: str
    depths: tuple[int, int]
    count: int = Field(ge=1)
    loaded: bool = False
    wanted: str = ""


@dataclass(frozen=True)
class TrialCell(Cell):
    """One comparison of an experiment, the `index`-th of `count`; else as `Group`."""

    index: int = 0
    count: int = 1
    depths: tuple[int, int] = (1, 1)
    loaded: bool = False
    wanted: str = ""


class Trial(Kind[TrialCell, Group]):
    """A comparison of which the truth is known."""

    name = "trial"
    group = Group

    def cells(self, group: Group, file: File, path: Path) -> list[TrialCell]:
        """The comparisons of an experiment.

        Where there are several experiments, the one of which the smallest share is done goes on, so that each has met the
        same hours of the machine, however far the whole has come.
        """
        own = (group.count, group.depths, group.loaded, group.wanted)
        return [
            TrialCell(f"{group.name}.{index:03d}", self.name, group.name, "", index / group.count, index, *own)
            for index in range(group.count)
        ]

    def key(self, cell: TrialCell, bench: Bench, record: Record | None = None) -> str:
        """Digest of the depths, the load and the seed."""
        return digest_of("benchmark trial", list(cell.depths), cell.loaded, cell.index, TAU)

    def is_current(self, cell: TrialCell, record: Record, bench: Bench) -> bool:
        """Whether its verdict follows from its slots."""
        with contextlib.suppress(ValueError):
            return bool(verdicts_of(record))
        return False

    def predict(self, todo: Sequence[TrialCell], bench: Bench, rate: float) -> dict[str, float]:
        """As long as those that are recorded took."""
        every = (bench.results.read(bench.suite.name, cell.name) for cell in bench.suite.cells)
        known = [record.seconds["compare"] for record in every if record is not None and record.kind == self.name]
        return dict.fromkeys((cell.name for cell in todo), statistics.mean(known) if known else SECONDS)

    def measure(self, cell: TrialCell, bench: Bench, progress: Progress) -> Outcome:
        """Compares the two stacks; what is kept are the medians of every slot, from which all statistics follow."""
        pair = [stack(depth, bench.work / "stacks") for depth in cell.depths]
        begun = time.monotonic()
        with load(cell.index, wanted=cell.loaded):
            comparison = bench.harness.compare(*pair, design=Design(tau=TAU, seed=cell.index))
        seconds = {"compare": time.monotonic() - begun}
        sessions = comparison.sessions
        result = {
            "verdict": comparison.verdict,
            "looks": comparison.design.looks,
            "slots_ns": [{n: slot_medians(each.slots_ns(n)).tolist() for n in VARIANTS} for each in sessions],
            "cores_of_others": cores_of_others([(e.fingerprint.before, e.fingerprint.after) for e in sessions]),
            "artifacts": {name: facts.sha256 for name, facts in comparison.artifacts.items()},
        }
        definition = {"experiment": cell.row, "index": cell.index, "depths": list(cell.depths), "loaded": cell.loaded}
        return Outcome(definition, result, comparison.environment, versions(), seconds)

    def summary(self, record: Record) -> str:
        """The verdict."""
        return str(record.result["verdict"])


def stack(depth: int, folder: Path) -> Path:
    """An ONNX file of one seeded ViT block, so many times; blocks differ in their random weights alone."""
    path = folder / f"depth{depth}.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        module = timm.create_model("vit_tiny_patch16_224", depth=depth, **SHAPE).eval()
        randomise_untrained(module, 0)
        meta = {"slimvit.tool": tool(), "benchmark": path.stem}
        export_onnx(module, path, input_size=(1, 28, 28), opset=20, metadata=meta, simplify=True)
    return path


def verdicts_of(record: Record) -> tuple[str, str]:
    """(the verdict that follows from a record's slots, what its first look had said if no other could follow).

    Raises:
        ValueError: it says another.
    """
    sessions, looks, seed = record.result["slots_ns"], record.result["looks"], record.definition["index"]
    first = sessions[:SESSIONS]
    if len(first) == len(sessions):
        verdict, alone = judged(first, (ALPHA / looks, ALPHA), seed=seed)
    else:
        (verdict,) = judged(sessions, (ALPHA / looks,), seed=seed)
        (alone,) = judged(first, (ALPHA,), seed=seed)
    if verdict != (said := record.result["verdict"]):
        raise ValueError(f"{record.suite}/{record.cell} says {said}, its slots give {verdict}")
    return verdict, alone


def judged(sessions: Sequence[Mapping[str, list[float]]], alphas: Sequence[float], *, seed: int) -> list[str]:
    """The verdict of sessions, each the slot medians of its variants, at each confidence 1 - alpha."""
    logs = {
        name: [np.log(np.array(each[name]) / np.array(each[A])) for each in sessions] for name in VARIANTS if name != A
    }
    drawn = {name: bootstrap_medians(each, seed=seed) for name, each in logs.items()}
    medians = [float(np.median(each)) for each in logs[B]]
    verdicts = []
    for alpha in alphas:
        ratio, control = (percentile_interval(logs[name], drawn[name], alpha=alpha) for name in (B, CONTROL))
        verdicts.append(judge(ratio, control, medians, TAU))
    return verdicts


KIND = Trial()
