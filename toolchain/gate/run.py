"""Runs a gate: static checks, then timing, then one repeat of every timing check that failed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from pydantic import ValidationError

from toolchain.devices.device import Devices
from toolchain.errors import ArtifactError
from toolchain.gate.accepts import Accept
from toolchain.gate.baselines import fetched, require_baselines
from toolchain.gate.config import GateConfig
from toolchain.gate.evidence import Evidence
from toolchain.gate.facts import look
from toolchain.gate.result import GateResult
from toolchain.gate.timing import Beginning, Clock, Pair
from toolchain.progress import SILENT, Progress
from toolchain.records import first_fault


def run_gate(
    config: GateConfig,
    accepts: Sequence[Accept] = (),
    *,
    tool: str,
    day: dt.date,
    devices: Devices | None = None,
    why: bool = False,
    clock: Clock = Clock(),
    progress: Progress = SILENT,
) -> GateResult:
    """What came of every cell.

    Args:
        config: the gate, its paths absolute.
        accepts: the regressions that were accepted.
        tool: name and version, for the record.
        day: today; an accept counts through the day that it expires.
        devices: where cells are timed, to be left open until the result is stored; None opens some of its own.
        why: also attribute the size of every cell's artifact, or its change, to layers.
        clock: takes one comparison, or cold starts.
        progress: how far the timing is.

    Raises:
        BaselineError: a baseline is missing, cannot be fetched or is another artifact; nothing is judged.
        RecipeError: a check does not suit its artifact or data.
        StorageError: an artifact cannot be read.
        ArtifactError: an artifact is damaged, or was replaced while the gate ran.
    """
    config = fetched(config)
    require_baselines(config)
    with nullcontext(devices) if devices is not None else Devices() as where:
        evidence = tuple(look(config, why=why))
        result = GateResult(tool=tool, day=day, accepts=tuple(accepts), evidence=evidence)
        for again in (False, True):  # what costs too much or is too slow is measured once more, after all else
            for measured, names in (
                (
                    _started,
                    result.too_costly_at_first if again else [e.cell.name for e in result.evidence if e.to_start],
                ),
                (_timed, result.too_slow_at_first if again else [e.cell.name for e in result.evidence if e.to_time]),
            ):
                cells = {each.cell.name: each for each in result.evidence}
                for index, name in enumerate(names):
                    step = progress.step(index, len(names), f"{name}, once more" if again else name)
                    cells[name] = measured(config, result, cells[name], where, clock, step)
                result = GateResult(**{**dict(result), "evidence": tuple(cells.values())})
    return result


def _timed(
    config: GateConfig, result: GateResult, evidence: Evidence, devices: Devices, clock: Clock, progress: Progress
) -> Evidence:
    """What is known of a cell after one more attempt to time it."""
    parity = evidence.parity
    assert parity != "fail"
    artifact, baseline = _paths(config, evidence)
    pair = Pair(
        cell=evidence.cell,
        target=config.settings(evidence.cell),
        artifact=artifact,
        baseline=baseline or artifact,
        parity=parity,
        tau=evidence.tau,
        seed=len(evidence.attempts),
        undecided=result.undecided(evidence),
    )
    attempts = (*evidence.attempts, clock.attempt(pair, devices, progress))
    return _extended(evidence, attempts=attempts)


def _started(
    config: GateConfig, result: GateResult, evidence: Evidence, devices: Devices, clock: Clock, progress: Progress
) -> Evidence:
    """What is known of a cell after its cold starts."""
    artifact, baseline = _paths(config, evidence)
    related = any(name.startswith("relation.") for name in evidence.cost_checks)
    beginning = Beginning(
        cell=evidence.cell,
        target=config.settings(evidence.cell),
        artifact=artifact,
        baseline=baseline if related else None,
        needs_more=result.needs_starts(evidence),
    )
    return _extended(evidence, starts=(*evidence.starts, clock.attempt_start(beginning, devices, progress)))


def _paths(config: GateConfig, evidence: Evidence) -> tuple[Path, Path | None]:
    return config.paths(next(cell for cell in config.cell if cell.name == evidence.cell.name))


def _extended(evidence: Evidence, **more: object) -> Evidence:
    try:
        return Evidence.model_validate({**dict(evidence), **more})
    except ValidationError as error:
        raise ArtifactError(f"{first_fault(error)}. Run the gate again, and leave its files alone meanwhile.") from None
