"""Measures one cell: times or starts its artifact and its baseline together, or says why that is impossible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from toolchain.devices.device import Device, Devices
from toolchain.devices.targets_toml import NamedTarget
from toolchain.errors import ArtifactError, MeasurementError, ParityError, StorageError, TargetUnavailable
from toolchain.gate.config import Cell
from toolchain.gate.evidence import Missing
from toolchain.gate.starts import LOOKS, Start, Starts
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison, Undecided
from toolchain.measure.experiment import artifact_facts, plan_experiment
from toolchain.measure.samples import A, B, Design, Parity, Workload
from toolchain.measure.session import cold_start_of
from toolchain.progress import SILENT, Progress
from toolchain.records import first_fault


@dataclass(frozen=True)
class Pair:
    """The inputs of a timing of a cell.

    Attributes:
        cell: what is asked, threads and cores resolved.
        target: the settings of its target.
        artifact: B of the comparison.
        baseline: A; the artifact itself where the cell names none.
        parity: what is proven of them.
        tau: tolerance of the comparison.
        seed: of inputs and orders.
        undecided: what the comparison grows by.
    """

    cell: Cell
    target: NamedTarget
    artifact: Path
    baseline: Path
    parity: Parity
    tau: float
    seed: int
    undecided: Undecided


@dataclass(frozen=True)
class Beginning:
    """The inputs of the cold starts of a cell.

    Attributes:
        cell: what is asked, threads and cores resolved.
        target: the settings of its target.
        artifact: what is opened.
        baseline: what is opened in turns with it; None if no relation asks for it.
        needs_more: whether some starts leave a check open.
    """

    cell: Cell
    target: NamedTarget
    artifact: Path
    baseline: Path | None
    needs_more: Callable[[Starts], bool]


def _workload(cell: Cell) -> Workload:
    return Workload(cell.batch, cell.threads or 1, cell.affinity, cell.input_shape)


def timed(pair: Pair, device: Device, progress: Progress, design: Design = Design()) -> Comparison:
    """The comparison of a pair on a device; errors as `measure.compare.compare`.

    Args:
        pair: what is timed.
        device: where.
        progress: how far it is.
        design: how; tolerance and seed are the pair's.
    """
    return compare(
        pair.baseline,
        pair.artifact,
        device,
        _workload(pair.cell),
        design.model_copy(update={"tau": pair.tau, "seed": pair.seed}),
        parity=pair.parity,
        undecided=pair.undecided,
        progress=progress,
    )


def started(beginning: Beginning, device: Device, progress: Progress) -> Starts:
    """Cold starts on a device, as many as decide; the first one of each file, which may read it from a disk, does not count.

    Raises:
        SlimvitError: as `plan_experiment` and `Measurer.run`; a MeasurementError also if the machine changed meanwhile.
    """
    files: dict[str, Path] = {B: beginning.artifact}
    if beginning.baseline is not None:
        files[A] = beginning.baseline
    experiment = plan_experiment(device.runtime, _workload(beginning.cell), Design().once, files)

    def pairs() -> Iterator[Start]:
        for index in range(LOOKS[-1] + 1):
            progress.at(index / LOOKS[-1], f"cold start {index} of at most {LOOKS[-1]}" if index else "a first start")
            order = tuple(files) if index % 2 else tuple(reversed(files))
            found = {name: cold_start_of(experiment, name, device.measurer, SILENT) for name in order}
            if index:
                yield Start(artifact=found[B], baseline=found.get(A))

    facts, measured = {name: artifact_facts(path) for name, path in files.items()}, list[Start]()
    for pair in pairs():
        measured.append(pair)
        if len(measured) in LOOKS:
            try:
                starts = Starts(
                    scenario=experiment.scenario, artifact=facts[B], baseline=facts.get(A), pairs=tuple(measured)
                )
            except ValidationError as error:
                raise MeasurementError(f"{beginning.artifact} on {device.name}: {first_fault(error)}") from None
            if not beginning.needs_more(starts):
                break
    return starts


@dataclass(frozen=True)
class Clock:
    """How a gate measures: a comparison, and cold starts."""

    compare: Callable[[Pair, Device, Progress], Comparison] = timed
    start: Callable[[Beginning, Device, Progress], Starts] = started

    def attempt(self, pair: Pair, devices: Devices, progress: Progress) -> Comparison | Missing:
        """The comparison of a pair, or why there is none; raises RecipeError if the workload does not fit its artifacts."""
        try:
            return self.compare(pair, devices.get(pair.cell.target, pair.target), progress)
        except NOT_MEASURED as error:
            return Missing.of(error)

    def attempt_start(self, beginning: Beginning, devices: Devices, progress: Progress) -> Starts | Missing:
        """The cold starts of a cell, or why there are none; raises as `attempt`."""
        try:
            return self.start(beginning, devices.get(beginning.cell.target, beginning.target), progress)
        except NOT_MEASURED as error:
            return Missing.of(error)


NOT_MEASURED = (TargetUnavailable, ParityError, ArtifactError, MeasurementError, StorageError)
"""Errors that concern one cell; the gate goes on."""
