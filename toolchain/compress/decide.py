"""The widths that a method decides before anything is reduced, and the closed loop that holds a latency budget.

A latency table adds up what units save when each kind is narrowed alone. What a whole model of the chosen shapes saves
differs a little: it is measured, the table is scaled to it, and the widths are chosen again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from toolchain.compress.allocate import Costs, Limits, solve_uniform
from toolchain.compress.closed_form import SHARES, Told, candidates_for, likelihood_for, what_matters
from toolchain.compress.method import HIDDEN, Allocation, allocate, choices_for, closed_sites
from toolchain.compress.sensitivity import Sensitivity
from toolchain.compress.solver import Candidate, Damages, choose, interpolate, narrowest
from toolchain.cost import LatencyTable, Widths
from toolchain.data import DataSource
from toolchain.errors import BudgetError, RecipeError
from toolchain.model import TimmModel
from toolchain.recipe import BudgetSection, CompressSection

log = logging.getLogger(__name__)
CLOSE = 0.02
"""How far, as a share of what was asked for, the measured latency may lie from it before the widths are chosen again."""
ROUNDS = 3
"""How often they are at most."""


@dataclass(frozen=True)
class Latency:
    """What is known, and what can be found out, about latency on the targets of a budget.

    Attributes:
        tables: one for each target.
        check: widths → {target: time of a model of these widths over the dense model's, measured}; None leaves the
            tables' word for it.
    """

    tables: tuple[LatencyTable, ...] = ()
    check: Callable[[Widths], Mapping[str, float]] | None = None

    def require(self, budget: BudgetSection) -> None:
        """Raises RecipeError if the budget limits latency on a target that has no table."""
        if missing := budget.latency.keys() - {table.target for table in self.tables}:
            raise RecipeError(
                f"budget.latency.{min(missing)} needs a latency table of that target, measured on the dense model; "
                "`slimvit run`, `plan` and `compress` measure it (toolchain.pipeline.latency_budget)"
            )


@dataclass(frozen=True)
class Settled:
    """Widths, the costs that they were chosen by, and their measured latency: target → ratio to dense."""

    widths: Widths
    costs: Costs
    measured: Mapping[str, float] = field(default_factory=dict)


def settle(pick: Callable[[Costs], Widths], costs: Costs, limits: Limits, latency: Latency) -> Settled:
    """The widths that a choice gives once the tables predict the measured latency.

    Chosen again, at most `ROUNDS` times, while a measured latency differs from the limit by more than `CLOSE`, except
    where it lies below because another limit binds. The closest of all rounds is returned; a limit that even this one
    misses is a warning on the log (`Limits.latency_met`).

    Args:
        pick: chooses widths within the limits, by some costs.
        costs: with the tables as they were measured.
        limits: the budget.
        latency: its `check` is called once for each round; without one the first choice stands.

    Raises:
        BudgetError: the limits cannot be met, or no longer can once the tables are corrected.
    """
    widths = pick(costs)
    if latency.check is None or not costs.tables:
        return Settled(widths, costs)
    tried: list[tuple[float, Settled]] = []
    for _ in range(ROUNDS + 1):
        measured = dict(latency.check(widths))
        off = _distance(costs, limits, widths, measured)
        tried.append((off, Settled(widths, costs, measured)))
        if off <= CLOSE:
            break
        costs = costs.corrected(widths, measured)
        try:
            again = pick(costs)
        except BudgetError:
            if min(off for off, _ in tried) > 2 * CLOSE:
                raise
            break
        if again in [settled.widths for _, settled in tried]:
            break
        widths = again
    found = min(tried, key=lambda one: one[0])[1]
    _warn_of_misses(found, limits)
    return found


def _warn_of_misses(found: Settled, limits: Limits) -> None:
    for table in found.costs.tables:
        share, wanted = found.measured[table.target], limits.latency_share(table)
        if not limits.latency_met(table, share):
            log.warning(
                "budget.latency.%s is missed: at most %.3f of the dense model's time was asked for, the chosen widths "
                "take %.3f; ask for less, or limit params or macs too",
                table.target,
                wanted,
                share,
            )


def _distance(costs: Costs, limits: Limits, widths: Widths, measured: Mapping[str, float]) -> float:
    """The largest share by which a measured latency misses its limit, from above, or from below where that limit binds."""
    worst = 0.0
    for table in costs.tables:
        wanted = limits.latency_share(table)
        off = measured[table.target] / wanted - 1
        binds = table.ratio(widths) >= wanted * (1 - CLOSE)
        if off > 0 or binds:
            worst = max(worst, abs(off))
    return worst if math.isfinite(worst) else math.inf


def decide(
    given: TimmModel,
    section: CompressSection,
    budget: BudgetSection,
    multiples: Mapping[str, int],
    source: DataSource,
    latency: Latency,
    told: Told,
) -> Allocation:
    """The allocation of a method: by measured damage, or uniform. Nothing of the model is changed.

    Where widths follow from scores over all layers ("global", with neurons to score) it is the uniform one, which these
    then redistribute.

    Raises:
        RecipeError, BudgetError: as `allocate`, and where latency is limited on a target without a table.
    """
    latency.require(budget)
    planned = allocate(given, section, budget, multiples, latency.tables)
    choices = choices_for(given.module, given.family, given.groups, section, multiples)
    costs, limits = planned.costs, planned.limits
    if section.allocation == "global" and any(group.unit == HIDDEN for group in choices.groups):
        return planned
    sites = closed_sites(choices, given.family, given.module, section) if section.allocation == "solver" else []
    cares: Mapping[str, Sensitivity] = {}
    measured: list[Candidate] = []
    if sites:
        likelihood = likelihood_for(given, source)
        cares = what_matters(given, planned.dense, source, section, likelihood)
        measured = candidates_for(given, sites, choices, planned.dense, source, section, cares, likelihood, told)
    candidates = interpolate(measured, sites, choices, SHARES[0])

    def pick(known: Costs) -> Widths:
        # A budget below the narrowest widths that were measured leaves little to choose: all layers shrink alike.
        if candidates and limits.met_by(known.of(narrowest(candidates, choices))):
            return choose(candidates, choices, known, limits)
        return solve_uniform(choices, known, limits)

    settled = settle(pick, costs, limits, latency)
    damage = Damages(candidates).all(choices.chosen(settled.widths))
    return replace(
        planned, widths=settled.widths, costs=settled.costs, damage=damage, measured=settled.measured, cares=cares
    )
