"""`bench/<target>.<precision>.b<batch>.t<threads>.json`: how fast a file is, beside the dense fp32 one or its rival."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts import open_artifact
from toolchain.artifacts.model_folder import ModelFolder
from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.devices.device import Device
from toolchain.errors import DeviceLost, TargetUnavailable, WorkloadRefused
from toolchain.export.precision import EITHER, product_of
from toolchain.measure.comparison import UNDECIDED
from toolchain.measure.experiment import workload_on
from toolchain.measure.samples import Parity
from toolchain.model import Made
from toolchain.parity import Rung
from toolchain.pipeline.cell import bench_row, conditions_of
from toolchain.pipeline.folder import Done, Workspace, Written
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.pipeline.stages.engine import DENSE
from toolchain.pipeline.stages.export import onnx_path
from toolchain.recipe import Recipe
from toolchain.report.record import BenchRow
from toolchain.targets import get_target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Where:
    """The device, batch and threads of a measurement."""

    device: Device
    batch: int
    threads: int

    @property
    def name(self) -> str:
        """The part of a stage's name that says where: `<target>.b<batch>.t<threads>`."""
        return f"{self.device.name}.b{self.batch}.t{self.threads}"


@dataclass(frozen=True)
class Bench(RunStage[BenchRow]):
    """A comparison of two artifacts of the run.

    Attributes:
        where: what it is measured on.
        kind: "bench" for a comparison with the dense file, "duel" for one of two precisions.
        precision: of the artifact that is judged, or what stands for the two of a duel.
        pair: the baseline, and what is judged.
        parity: what the rungs prove about both.
        rivals: the precisions of a duel.
    """

    run: Run
    where: Where
    kind: str
    precision: str
    pair: tuple[Path, Path]
    parity: Parity
    rivals: tuple[str, str] | None = None
    facts = BenchRow

    @property
    def name(self) -> str:
        suffix = f".{self.precision}" if self.kind == "bench" and self.precision != FP32 else ""
        return f"{self.kind}-{self.where.name}{suffix}"

    @property
    def inputs(self) -> Sequence[Any]:
        device, batch, threads = self.where.device, self.where.batch, self.where.threads
        digests = [open_artifact(path).sha256 for path in self.pair]
        return [digests, device.name, batch, threads, self.parity, conditions_of(device.name, threads)]

    @property
    def entries(self) -> Iterable[object]:
        return (get_target(self.where.device.runtime),)

    def work(self, key: str) -> Made[Written, BenchRow]:  # noqa: ARG002
        run, device = self.run, self.where.device
        if device.name in run.lost:  # what was recorded before is reused; nothing more is asked of it
            raise run.lost[device.name]
        comparison = run.compare(
            *self.pair,
            device,
            workload_on(device, batch=self.where.batch, threads=self.where.threads),
            parity=self.parity,
            progress=run.progress,
        )
        path = run.root / "bench" / f"{device.name}.{self.precision}.b{self.where.batch}.t{self.where.threads}.json"
        comparison.save(path)
        baseline, timed = (each.relative_to(run.root).as_posix() for each in self.pair)
        return Made((path,), bench_row(device.name, self.precision, (baseline, timed), comparison, self.rivals))

    def settles(self, facts: BenchRow) -> bool:
        return facts.verdict not in UNDECIDED


def measured(run: Run, stage: Bench) -> Done[BenchRow] | None:
    """A comparison, or what an earlier run knows of it where its device is lost or refuses it; None if that is nothing.

    Raises:
        TargetUnavailable: this machine lacks what is needed.
    """
    device = stage.where.device
    try:
        return run.do(stage)
    except WorkloadRefused as error:
        log.warning("%s The run goes on without it.", error)
        run.refused[stage.name] = error
        return run.keep(stage)
    except TargetUnavailable as error:
        if device.is_here and not isinstance(error, DeviceLost):
            raise
        if device.name not in run.lost:
            log.warning("%s The run goes on without it.", error)
        run.lost[device.name] = error
        return run.keep(stage)


def pair(run: Run, where: Where, precision: str, engines: Mapping[tuple[str, str], Path]) -> tuple[Path, Path] | None:
    """The dense fp32 and the compressed artifact that are timed on a device; None where it runs none of the precision.

    They are ONNX files, or model folders where these are what is run, or what the runtime itself built. Folders are fp32.

    Args:
        run: with the files.
        where: it is.
        precision: of the compressed one.
        engines: (target, precision) → engine that was built; of the dense file the precision is `DENSE`.
    """
    runtime = get_target(where.device.runtime)
    if product_of(precision) not in runtime.loads:
        return None
    folders = (run.root / "dense", run.root / "deploy") if precision == FP32 else None
    pairs = {
        OnnxFile.name: (onnx_path(run.root, FP32, "dense"), onnx_path(run.root, precision)),
        ModelFolder.name: folders,
    }
    dense, built = (engines.get((where.device.runtime, name)) for name in (DENSE, precision))
    own = None if dense is None or built is None else (dense, built)
    return next((pairs[kind] for kind in runtime.takes if kind in pairs), own)


def times_engines(target: str) -> bool:
    """Whether what is timed on a target is what it built itself, because it opens nothing else that a run has."""
    return not {OnnxFile.name, ModelFolder.name} & set(get_target(target).takes)


def duel(first: Bench, second: Bench) -> Bench:
    """One kind of int8 against another, to know the faster of the two."""
    parity: Parity = "pass" if first.parity == second.parity == "pass" else "not claimed"
    files, rivals = (first.pair[1], second.pair[1]), (first.precision, second.precision)
    return Bench(first.run, first.where, "duel", EITHER, files, parity, rivals)


def fastest_two(cells: Iterable[tuple[Bench, Done[BenchRow] | None]], kinds: Sequence[str]) -> list[Bench]:
    """Of the cells of some precisions those two that took the least of the dense file's time, in the order of `kinds`."""
    shares = {cell.precision: (done.facts.ratio.point, cell) for cell, done in cells if done is not None}
    fastest = sorted((name for name in kinds if name in shares), key=lambda name: shares[name][0])[:2]
    return [shares[name][1] for name in kinds if name in fastest]


def claim(rungs: Iterable[Rung]) -> Parity:
    """The parity that the rungs leading to a file prove."""
    return "pass" if {rung.verdict for rung in rungs} == {"pass"} else "not claimed"


def measured_on(space: Workspace, recipe: Recipe) -> list[str]:
    """Those targets of a recipe's [bench] and [budget] on which an earlier run in the folder measured something."""
    timed = [name for name in (recipe.bench.targets if recipe.bench else ()) if space.has(f"bench-{name}.b")]
    return [*timed, *(name for name in recipe.budget.latency if space.has(f"latency-{name}.json"))]
