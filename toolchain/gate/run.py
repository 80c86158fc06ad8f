"""A gate from its baselines to its verdict: exact checks first, then latency, then what is said of all together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from toolchain.devices.device import Devices
from toolchain.gate.accepts import Accepts
from toolchain.gate.checks import Deterministic
from toolchain.gate.config import Cell, GateConfig, require_baselines
from toolchain.gate.judgement import RATIO, TIME
from toolchain.gate.result import CellResult, Check, GateResult
from toolchain.gate.timing import Timeable, Timed, time_cells
from toolchain.gate.why import size_changes
from toolchain.measure.experiment import artifact_facts
from toolchain.measure.samples import Design, Parity
from toolchain.progress import SILENT, Progress


def run_gate(
    config: GateConfig,
    accepts: Accepts,
    *,
    tool: str,
    devices: Devices | None = None,
    why: bool = False,
    design: Design = Design(),
    progress: Progress = SILENT,
) -> GateResult:
    """What came of every cell.

    Args:
        config: the gate, its paths absolute.
        accepts: the regressions that were accepted.
        tool: name and version, for the record.
        devices: where cells are timed, to be left open until the result is stored; None opens some of its own.
        why: also attribute the size of every cell's artifact, or its change, to layers.
        design: how latency is timed; the tolerance is each cell's own.
        progress: who is told how far the timing is.

    Raises:
        BaselineError: a baseline is missing or is another artifact; nothing is judged.
        RecipeError: a check does not suit its artifact or data.
        StorageError: an artifact cannot be read.
        ArtifactError: an artifact is damaged.
    """
    if devices is None:
        with Devices() as own:
            return run_gate(config, accepts, tool=tool, devices=own, why=why, design=design, progress=progress)
    require_baselines(config)
    exact = Deterministic(config.data, accepts)
    checks: dict[str, list[Check]] = {}
    timeables = []
    for cell in config.cell:
        artifact, baseline = _paths(config, cell)
        checks[cell.name] = exact.checks(cell, artifact, baseline)
        if {RATIO, TIME} & set(cell.checks):
            timeables.append(Timeable(cell, artifact, baseline or artifact, _parity(checks[cell.name])))
    timed, summary, holm = time_cells(timeables, accepts, devices, design, progress)
    return GateResult(
        tool=tool,
        cells=tuple(
            _result(config, cell, checks[cell.name], timed.get(cell.name, Timed(())), devices, why=why)
            for cell in config.cell
        ),
        accepts=accepts.uses([(cell.name, check) for cell in config.cell for check in cell.checks]),
        summary=summary,
        holm=holm,
    )


def _paths(config: GateConfig, cell: Cell) -> tuple[Path, Path | None]:
    return Path(cell.artifact), Path(config.baseline[cell.baseline].path) if cell.baseline else None


def _parity(checks: list[Check]) -> Parity | Literal["fail"]:
    """What the parity check of a cell allows to say of its latency."""
    status = next((check.status for check in checks if check.name == "relation.parity"), None)
    return "not claimed" if status is None else "pass" if status == "pass" else "fail"


def _result(
    config: GateConfig, cell: Cell, checks: list[Check], timed: Timed, devices: Devices, *, why: bool
) -> CellResult:
    artifact, baseline = _paths(config, cell)
    return CellResult(
        name=cell.name,
        target=cell.target,
        batch=cell.batch,
        threads=cell.threads or devices.settings(cell.target).threads,
        artifact=artifact_facts(artifact),
        baseline=None if baseline is None else artifact_facts(baseline),
        checks=(*checks, *timed.checks),
        why=size_changes(artifact, baseline) if why else None,
        comparisons=tuple(comparison.to_dict() for comparison in timed.comparisons),
    )
