"""The latency checks: baseline and artifact timed together, judged together, and a regression confirmed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from toolchain.bench.compare import compare
from toolchain.bench.device import Devices
from toolchain.bench.gate.accepts import Accepts
from toolchain.bench.gate.config import Cell
from toolchain.bench.gate.judgement import RATIO, TIME, Judgement, estimate_of, judgement_of, logs_of
from toolchain.bench.gate.result import Check, Holm, Status, Summary, Unit
from toolchain.bench.intervals import (
    RESAMPLES,
)
from toolchain.bench.multiplicity import geometric_mean, holm, p_value_above
from toolchain.bench.protocol import Comparison
from toolchain.bench.samples import Parity
from toolchain.errors import ArtifactError, MeasurementError, ParityError, StorageError, TargetUnavailable

UNITS: dict[str, Unit] = {RATIO: "ratio", TIME: "ms"}
ALONE = 5
"""Up to this many latency cells are judged each by itself, more of them by Holm's procedure."""
DEFAULT_TAU = 0.05
Told = Callable[[str, float], None]
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

    def limit(self, check: str) -> float:
        """Milliseconds, or the ratio of times."""
        return (self.cell.budget.latency or 0.0) if check == TIME else 1 + (self.cell.relation.latency or 0.0)


@dataclass(frozen=True)
class Timed:
    """What came of a cell's latency checks, and every comparison that was made for them."""

    checks: tuple[Check, ...]
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class _Case:
    """One latency check with its first measurement."""

    timeable: Timeable
    check: str
    comparison: Comparison
    accepted: float | None
    p_value: float = 1.0
    judgement: Judgement = "invalid"
    note: str = ""
    again: Comparison | None = field(default=None, repr=False)

    @property
    def bound(self) -> float:
        """The value that the check fails beyond: the limit, or what was accepted."""
        return max(self.timeable.limit(self.check), self.accepted or 0.0)


def time_cells(
    timeables: Sequence[Timeable], accepts: Accepts, devices: Devices, told: Told
) -> tuple[dict[str, Timed], Summary | None, Holm | None]:
    """Cell → its latency checks; the mean ratio over cells; how the checks were judged together.

    Raises:
        RecipeError: a cell's workload does not fit its artifacts.
    """
    done: dict[str, Timed] = {}
    measured: dict[str, Comparison] = {}
    cases: list[_Case] = []
    for index, each in enumerate(timeables):
        name = each.cell.name
        outcome = _measure(each, devices, 0, _part(told, name, index, len(timeables)))
        if isinstance(outcome, Comparison):
            measured[name] = outcome
            cases += [_Case(each, check, outcome, accepts.limit(name, check)) for check in each.checks]
        else:
            status, reason = outcome
            done[name] = Timed(tuple(_unmeasured(each, check, status, reason) for check in each.checks))
    cases, together = _judged(cases, len(measured))
    cases = _confirmed(cases, devices, told)
    for name, comparison in measured.items():
        ours = [case for case in cases if case.timeable.cell.name == name]
        again = next((case.again for case in ours if case.again is not None), None)
        found = tuple(_check(case, accepts) for case in ours)
        done[name] = Timed(found, (comparison,) if again is None else (comparison, again))
    related = [m for t in timeables if RATIO in t.checks and (m := measured.get(t.cell.name)) is not None]
    return done, _summary([m for m in related if m.verdict != "invalid"]), together


def _measure(each: Timeable, devices: Devices, seed: int, told: Told) -> Outcome:
    """The comparison of a cell, or why there is none."""
    if each.parity == "fail":
        return "skipped", "not timed: parity with the baseline failed"
    cell = each.cell
    try:
        device = devices.get(cell.target)
        return compare(
            each.baseline,
            each.artifact,
            target=device.runtime,
            threads=cell.threads or device.threads,
            affinity=cell.affinity or device.affinity,
            transport=device.transport,
            batch=cell.batch,
            input_shape=cell.input_shape,
            tau=cell.relation.latency or DEFAULT_TAU,
            seed=seed,
            parity=each.parity,
            on_progress=told,
        )
    except TargetUnavailable as error:
        return "skipped", str(error)
    except (ParityError, ArtifactError) as error:
        return "fail", str(error)
    except (MeasurementError, StorageError) as error:
        return "invalid", str(error)


def _part(told: Told, name: str, index: int, of: int) -> Told:
    """Who is told of one comparison, the `index`-th of several."""
    return lambda text, share: told(f"{name}: {text}", (index + share) / of)


def _judged(cases: Sequence[_Case], cells: int) -> tuple[list[_Case], Holm | None]:
    """Every case with its judgement; over more than `ALONE` cells a regression has to survive Holm's procedure."""
    if not cases:
        return [], None
    alpha = min(case.comparison.design.alpha for case in cases) / 2  # one-sided
    resamples = max(RESAMPLES, math.ceil(4 * len(cases) / alpha))
    found = []
    for case in cases:
        judgement = judgement_of(case.check, case.comparison, case.timeable.limit(case.check), case.accepted)
        p = 1.0
        if judgement != "invalid":
            design = case.comparison.design
            blocks = logs_of(case.check, case.comparison)
            p = p_value_above(blocks, math.log(case.bound), resamples=resamples, seed=design.seed) * design.looks
        found.append(replace(case, judgement=judgement, p_value=min(p, 1.0)))
    if cells <= ALONE:
        return found, None
    rejected = holm([case.p_value for case in found], alpha)
    for index, case in enumerate(found):
        if case.judgement == "regressed" and not rejected[index]:
            note = f"regressed by itself, not among {len(found)} checks together (Holm)"
            found[index] = replace(case, judgement="inconclusive", note=note)
    return found, Holm(hypotheses=len(found), alpha=alpha)


def _confirmed(cases: Sequence[_Case], devices: Devices, told: Told) -> list[_Case]:
    """The same cases, each regression measured once more; one that does not repeat leaves doubt and no failure."""
    again: dict[str, Outcome] = {}
    found = []
    for case in cases:
        if case.judgement != "regressed":
            found.append(case)
            continue
        each = case.timeable
        name = each.cell.name
        if name not in again:
            again[name] = _measure(each, devices, 1, _part(told, f"{name}, once more", 0, 1))
        second = again[name]
        if not isinstance(second, Comparison):
            found.append(replace(case, judgement="inconclusive", note=f"could not be confirmed: {second[1]}"))
            continue
        repeated = judgement_of(case.check, second, each.limit(case.check), case.accepted)
        if repeated == "regressed":
            found.append(replace(case, again=second, note="confirmed in a fresh measurement"))
        else:
            note = f"regressed at first, {repeated} in a fresh measurement"
            found.append(replace(case, judgement="inconclusive", again=second, note=note))
    return found


def _check(case: _Case, accepts: Accepts) -> Check:
    """The check of a case that is settled."""
    status: Mapping[Judgement, Status] = {
        "pass": "pass",
        "regressed": "fail",
        "accepted": "accepted",
        "inconclusive": "inconclusive",
        "invalid": "invalid",
    }
    if case.accepted is not None and case.judgement in ("accepted", "regressed"):
        accepts.note(case.timeable.cell.name, case.check, "used" if case.judgement == "accepted" else "exceeded")
    comparison, estimate = case.comparison, estimate_of(case.check, case.comparison).to_ratio()
    limit, unit = case.timeable.limit(case.check), UNITS[case.check]
    shown = f"{estimate['point']:.3f} [{estimate['lo']:.3f}, {estimate['hi']:.3f}]"
    said = [f"{shown} ms" if unit == "ms" else f"{shown} of the baseline's time", f"at most {limit:g}"]
    if case.judgement == "invalid":
        said.append(f"the control strays too far, this run supports τ ≥ {100 * comparison.tau_min:.1f} %")
    elif case.judgement == "inconclusive" and not case.note:
        said.append(_doubt(case))
    if case.accepted is not None:
        said.append(f"accepted up to {case.accepted:.3f}")
    return Check(
        name=case.check,
        status=status[case.judgement],
        unit=unit,
        value=estimate["point"],
        limit=limit,
        baseline=comparison.latency_ms("A") if case.check == RATIO else None,
        lo=estimate["lo"],
        hi=estimate["hi"],
        p_value=case.p_value,
        reason="; ".join([*said, *([case.note] if case.note else [])]),
    )


def _doubt(case: _Case) -> str:
    """Why a measurement says neither that a limit is kept nor that it is not."""
    medians = [float(np.median(session)) for session in logs_of(case.check, case.comparison)]
    spread = max(medians) - min(medians)
    estimate = estimate_of(case.check, case.comparison)
    if estimate.lo <= math.log(case.bound) < estimate.hi:
        return "the interval holds the limit"
    return f"sessions differ by {100 * math.expm1(spread):.1f} %"


def _unmeasured(each: Timeable, check: str, status: Status, reason: str) -> Check:
    return Check(name=check, status=status, unit=UNITS[check], limit=each.limit(check), reason=reason)


def _summary(comparisons: Sequence[Comparison]) -> Summary | None:
    """The geometric mean over at least two comparisons."""
    if len(comparisons) < 2:
        return None
    mean = geometric_mean([logs_of(RATIO, each) for each in comparisons]).to_ratio()
    return Summary(cells=len(comparisons), **mean)
