"""One measurement of a cell: its baseline and its artifact timed together, or why that could not be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolchain.devices.device import Device, Devices
from toolchain.errors import ArtifactError, MeasurementError, ParityError, StorageError, TargetUnavailable
from toolchain.gate.config import Cell
from toolchain.gate.evidence import Missing
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison, Undecided
from toolchain.measure.samples import Design, Parity, Workload
from toolchain.progress import Progress


@dataclass(frozen=True)
class Pair:
    """What is timed for a cell.

    Attributes:
        cell: what is asked, threads and cores resolved.
        artifact: B of the comparison.
        baseline: A; the artifact itself where the cell names none.
        parity: what is proven of them.
        tau: tolerance of the comparison.
        seed: of inputs and orders.
        undecided: what the comparison grows by.
    """

    cell: Cell
    artifact: Path
    baseline: Path
    parity: Parity
    tau: float
    seed: int
    undecided: Undecided


Measure = Callable[[Pair, Device, Progress], Comparison]


def timed(pair: Pair, device: Device, progress: Progress, design: Design = Design()) -> Comparison:
    """The comparison of a pair on a device; errors as `measure.compare.compare`.

    Args:
        pair: what is timed.
        device: where.
        progress: how far it is.
        design: how; tolerance and seed are the pair's.
    """
    cell = pair.cell
    return compare(
        pair.baseline,
        pair.artifact,
        device,
        Workload(cell.batch, cell.threads or 1, cell.affinity, cell.input_shape),
        design.model_copy(update={"tau": pair.tau, "seed": pair.seed}),
        parity=pair.parity,
        undecided=pair.undecided,
        progress=progress,
    )


def attempt(pair: Pair, devices: Devices, measure: Measure, progress: Progress) -> Comparison | Missing:
    """The comparison of a pair, or why there is none; raises RecipeError if the workload does not fit its artifacts."""
    try:
        return measure(pair, devices.get(pair.cell.target), progress)
    except (TargetUnavailable, ParityError, ArtifactError, MeasurementError, StorageError) as error:
        return Missing.of(error)
