"""The latency checks: baseline and artifact timed together, and a regression confirmed by measuring once more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from toolchain.devices.device import Devices
from toolchain.errors import (
    ArtifactError,
    DeviceLost,
    MeasurementError,
    ParityError,
    StorageError,
    TargetUnavailable,
)
from toolchain.gate.accepts import Accepts
from toolchain.gate.config import Cell
from toolchain.gate.judgement import RATIO, TIME, estimate_of, logs_of, undecided_by
from toolchain.gate.limits import limit_of
from toolchain.gate.result import STATUS, Check, Status, Unit
from toolchain.gate.together import (
    Case,
    Holm,
    Judged,
    Summary,
    confirmed,
    judge_together,
    summary_of,
)
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.experiment import workload_on
from toolchain.measure.samples import Design, Parity
from toolchain.progress import Progress

UNITS: dict[str, Unit] = {RATIO: "ratio", TIME: "ms"}
Outcome = Comparison | tuple[Status, str]
"""A comparison, or why there is none."""


@dataclass(frozen=True)
class Timeable:
    """A cell with latency checks: its files, and what was proven of them.

    Attributes:
        cell: what is asked.
        artifact: B of the comparison.
        baseline: A; the artifact itself where the cell names none.
        parity: what the gate has proven; no latency is taken of what failed.
    """

    cell: Cell
    artifact: Path
    baseline: Path
    parity: Parity | Literal["fail"]

    @property
    def checks(self) -> tuple[str, ...]:
        """Those of RATIO and TIME that the cell asks for."""
        return tuple(name for name in (TIME, RATIO) if name in self.cell.checks)

    def asked(self, check: str) -> float:
        """Milliseconds, or the share by which the time may grow."""
        return (self.cell.budget.latency if check == TIME else self.cell.relation.latency) or 0.0

    def limit(self, check: str) -> float:
        """Milliseconds, or the ratio of times."""
        return limit_of(check, self.asked(check))


@dataclass(frozen=True)
class Timed:
    """What came of a cell's latency checks, and every comparison that was made for them."""

    checks: tuple[Check, ...]
    comparisons: tuple[Comparison, ...] = ()


def time_cells(
    timeables: Sequence[Timeable], accepts: Accepts, devices: Devices, design: Design, progress: Progress
) -> tuple[dict[str, Timed], Summary | None, Holm | None]:
    """Cell → its latency checks; the mean ratio over cells; how the checks were judged together.

    Raises:
        RecipeError: a cell's workload does not fit its artifacts.
    """
    done: dict[str, Timed] = {}
    cases: list[Case] = []
    for index, each in enumerate(timeables):
        name = each.cell.name
        outcome = _measure(each, accepts, devices, design, progress.step(index, len(timeables), name))
        if isinstance(outcome, Comparison):
            cases += [Case(name, c, each.limit(c), accepts.limit(name, c), outcome) for c in each.checks]
        else:
            done[name] = Timed(tuple(_unmeasured(each, check, *outcome) for check in each.checks))
    found, together = judge_together(cases)
    again: dict[str, Outcome] = {}
    fresh = design.model_copy(update={"seed": design.seed + 1})
    for index, (case, judged) in enumerate(zip(cases, found, strict=True)):
        if judged.judgement == "regressed":
            if case.cell not in again:
                each = next(each for each in timeables if each.cell.name == case.cell)
                again[case.cell] = _measure(
                    each, accepts, devices, fresh, progress.part(0, 1, f"{case.cell}, once more")
                )
            second = again[case.cell]
            found[index] = confirmed(case, judged, second if isinstance(second, Comparison) else second[1])
    for case in cases:
        each = next(each for each in timeables if each.cell.name == case.cell)
        ours = tuple(
            _check(*pair, each, accepts) for pair in zip(cases, found, strict=True) if pair[0].cell == case.cell
        )
        second = again.get(case.cell, ("skipped", ""))
        both = (case.comparison, second) if isinstance(second, Comparison) else (case.comparison,)
        done[case.cell] = Timed(ours, both)
    return done, summary_of(cases), together


def _measure(each: Timeable, accepts: Accepts, devices: Devices, design: Design, progress: Progress) -> Outcome:
    """The comparison of a cell, or why there is none."""
    if each.parity == "fail":
        return "skipped", "not timed: parity with the baseline failed"
    cell = each.cell
    try:
        device = devices.get(cell.target)
        return compare(
            each.baseline,
            each.artifact,
            device,
            workload_on(
                device,
                batch=cell.batch,
                threads=cell.threads,
                affinity=cell.affinity,
                input_shape=cell.input_shape,
            ),
            design.model_copy(update={"tau": cell.relation.latency or design.tau}),
            parity=each.parity,
            undecided=undecided_by({c: (each.limit(c), accepts.limit(cell.name, c)) for c in each.checks}),
            progress=progress,
        )
    except DeviceLost as error:
        return "invalid", str(error)
    except TargetUnavailable as error:
        return ("fail", f"required, but {error}") if cell.required else ("skipped", str(error))
    except (ParityError, ArtifactError) as error:
        return "fail", str(error)
    except (MeasurementError, StorageError) as error:
        return "invalid", str(error)


def _check(case: Case, judged: Judged, each: Timeable, accepts: Accepts) -> Check:
    """The check of a case that is settled."""
    if case.accepted is not None and judged.judgement in ("accepted", "regressed"):
        accepts.note(case.cell, case.check, "used" if judged.judgement == "accepted" else "exceeded")
    comparison, estimate = case.comparison, estimate_of(case.check, case.comparison).to_ratio()
    unit = UNITS[case.check]
    shown = f"{estimate['point']:.3f} [{estimate['lo']:.3f}, {estimate['hi']:.3f}]"
    said = [f"{shown} ms" if unit == "ms" else f"{shown} of the baseline's time", f"at most {case.limit:g}"]
    if judged.judgement == "invalid":
        said.append(f"the control strays too far, this run supports τ ≥ {100 * comparison.tau_min:.1f} %")
    elif judged.judgement == "inconclusive" and not judged.note:
        said.append(_doubt(case))
    if case.accepted is not None:
        said.append(f"accepted up to {case.accepted:.3f}")
    return Check(
        name=case.check,
        status=STATUS[judged.judgement],
        unit=unit,
        value=estimate["point"],
        limit=case.limit,
        asked=each.asked(case.check),
        baseline=comparison.latency_ms("A") if case.check == RATIO else None,
        lo=estimate["lo"],
        hi=estimate["hi"],
        p_value=judged.p_value,
        reason="; ".join([*said, *([judged.note] if judged.note else [])]),
    )


def _doubt(case: Case) -> str:
    """Why a measurement says neither that a limit is kept nor that it is not."""
    medians = [float(np.median(session)) for session in logs_of(case.check, case.comparison)]
    spread = max(medians) - min(medians)
    estimate = estimate_of(case.check, case.comparison)
    if estimate.lo <= math.log(case.bound) < estimate.hi:
        return "the interval holds the limit"
    return f"sessions differ by {100 * math.expm1(spread):.1f} %"


def _unmeasured(each: Timeable, check: str, status: Status, reason: str) -> Check:
    return Check(
        name=check,
        status=status,
        unit=UNITS[check],
        limit=each.limit(check),
        asked=each.asked(check),
        reason=reason,
    )
