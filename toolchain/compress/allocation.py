"""Chooses the width of each layer before anything is reduced, and corrects the choice by measured latency.

A latency table adds up the savings of units that were narrowed one kind at a time. A whole model of the chosen shapes saves
slightly more or less: it is timed, the table is scaled to match, and the widths are chosen again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from toolchain.compress.choices import Budget, Costs, Key
from toolchain.compress.front import front
from toolchain.compress.outcome import FrontPoint, LatencyBudget, SizeBudget
from toolchain.compress.problem import Problem
from toolchain.compress.solver import Candidate, Damages, narrowest
from toolchain.cost import RANK, LatencyTable, ModelShape, Widths
from toolchain.errors import BudgetError
from toolchain.plan import CompressionPlan

log = logging.getLogger(__name__)
CLOSE = 0.02
"""Relative deviation of measured from requested latency above which the widths are chosen again."""
ROUNDS = 3
"""How many times at most the widths are chosen again."""
Check = Callable[[Widths], Mapping[str, float]]
"""Widths → {target: time of a model of these widths over the dense model's, measured}."""


@dataclass(frozen=True)
class Latency:
    """Latency tables, one for each target of a budget, and a function that times any widths."""

    tables: tuple[LatencyTable, ...] = ()
    check: Check | None = None


UNTIMED = Latency()


@dataclass(frozen=True)
class Settled:
    """Widths, the costs that they were chosen by, and their measured latency: target → ratio to dense."""

    widths: Widths
    costs: Costs
    measured: Mapping[str, float] = field(default_factory=dict)


def settle(pick: Callable[[Costs], Widths], costs: Costs, budget: Budget, check: Check | None) -> Settled:
    """Chooses widths until the latency tables predict what is measured.

    Chosen again, at most `ROUNDS` times, while a measured latency differs from the budget by more than `CLOSE`, except
    where it lies below because another budget binds. The closest of all rounds is returned; a budget that even this one
    misses is a warning on the log (`Budget.latency_met`).

    Args:
        pick: chooses widths within the budget, by some costs.
        costs: with the tables as they were measured.
        budget: the most that they may cost.
        check: measures latency, once for each round; without it the first choice stands.

    Raises:
        BudgetError: the budget cannot be met, or no longer can once the tables are corrected.
    """
    widths = pick(costs)
    if check is None or not costs.tables:
        return Settled(widths, costs)
    tried: list[tuple[float, Settled]] = []
    for _ in range(ROUNDS + 1):
        measured = dict(check(widths))
        off = _distance(costs, budget, widths, measured)
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
    closest = min(tried, key=lambda one: one[0])[1]
    _warn_of_misses(closest, budget)
    return closest


def _warn_of_misses(settled: Settled, budget: Budget) -> None:
    for table in settled.costs.tables:
        share, wanted = settled.measured[table.target], budget.latency_share(table)
        if not budget.latency_met(table, share):
            log.warning(
                "budget.latency.%s is missed: at most %.3f of the dense model's time was asked for, the chosen widths "
                "take %.3f; ask for less, or limit params or macs too",
                table.target,
                wanted,
                share,
            )


def _distance(costs: Costs, budget: Budget, widths: Widths, measured: Mapping[str, float]) -> float:
    """The largest share by which a measured latency misses its budget, from above, or from below where that budget binds."""
    worst = 0.0
    for table in costs.tables:
        wanted = budget.latency_share(table)
        off = measured[table.target] / wanted - 1
        binds = table.ratio(widths) >= wanted * (1 - CLOSE)
        if off > 0 or binds:
            worst = max(worst, abs(off))
    return worst if math.isfinite(worst) else math.inf


@dataclass(frozen=True)
class Allocation:
    """How wide each layer stays, and what that is predicted to cost and to damage.

    Attributes:
        problem: what is compressed, within what.
        settled: the widths, and the costs that they were chosen by.
        damage: unit or linear → what its width does to the output, measured alone: mean KL divergence per image, nats.
        planned: the allocation before scores over all layers moved its widths, where they did.
        learned: whether the final widths depend on learned or measured scores.
        front: what other budgets would do, from the narrowest widths to the widest; empty where no damage was measured.
    """

    problem: Problem
    settled: Settled
    damage: Mapping[Key, float] = field(default_factory=dict)
    planned: Allocation | None = None
    learned: bool = False
    front: tuple[FrontPoint, ...] = ()

    @staticmethod
    def uniform(problem: Problem) -> Allocation:
        """All layers alike, as shapes alone tell."""
        return Allocation(
            problem,
            Settled(problem.uniform, problem.costs),
            learned=problem.method.weighs or problem.method.allocation.over_layers,
        )

    @property
    def widths(self) -> Widths:
        """The decision."""
        return self.settled.widths

    @property
    def total(self) -> float:
        """What the widths, each measured alone, and the rounding of the file that a budget leaves open do to the outputs: nats an image."""
        own = [file.rounding or 0.0 for file in self.files if file.precision == self.problem.file]
        return sum(self.damage.values()) + sum(own)

    @property
    def predicted(self) -> ModelShape:
        """The shape that `widths` leave."""
        return self.problem.costs.shape(self.widths)

    def decided(self, plan: CompressionPlan, settled: Settled | None = None) -> Allocation:
        """This allocation with the widths of a plan that was made from it, by other costs where they were settled anew."""
        known = self.settled if settled is None else settled
        from_plan = Widths.of(plan)
        totals = {(group.module, group.unit): group.total for group in self.problem.dense.groups}
        whole = {key: totals[key] for key in self.widths.kept}  # a plan does not name what it leaves whole
        widths = Widths({**whole, **from_plan.kept}, from_plan.ranks)
        if widths == self.widths:
            return self if settled is None else replace(self, settled=settled)
        # What is only zeroed takes its time all the same: widths that differ in nothing else were timed already.
        same = all(widths.kept[key] == count for key, count in self.widths.kept.items())
        timed = known.measured if settled is not None or (same and widths.ranks == self.widths.ranks) else {}
        return replace(self, settled=Settled(widths, known.costs, timed), damage={}, planned=self)

    @property
    def smallest(self) -> ModelShape:
        """The shape that the narrowest widths leave."""
        return self.problem.costs.shape(self.problem.narrowest)

    @property
    def latency(self) -> tuple[LatencyBudget, ...]:
        """What the widths mean on each target of the budget."""
        return tuple(self._latency(table) for table in self.settled.costs.tables)

    @property
    def files(self) -> tuple[SizeBudget, ...]:
        """What the widths mean for each file that the budget speaks of."""
        most = self.problem.budget.asked
        shapes = (self.predicted, self.smallest, self.problem.shape)
        sizes = {file: [math.ceil(file.bytes_of(shape)) for shape in shapes] for file in self.problem.costs.files}
        return tuple(
            SizeBudget(
                precision=file.precision,
                requested=most.get(file.name),
                predicted=own,
                reachable=(least, whole),
                rounding=file.damage,
            )
            for file, (own, least, whole) in sizes.items()
        )

    def to_dict(self) -> dict[str, object]:
        """The content of allocation.json."""
        dense, smallest = _cost(self.problem.shape), _cost(self.smallest)
        return {
            "schema": "slimvit.allocation/1",
            "learned": self.learned,
            "dense": dense,
            "reachable": {name: [smallest[name] / dense[name], 1.0] for name in dense},
            **self.outcome(),
            "damage": sum(self.damage.values()) if self.damage else None,
            "front": [point.model_dump() for point in self.front],
            "files": [file.model_dump(mode="json", exclude={"bytes"}) for file in self.files],
            "latency": [target.model_dump(mode="json") for target in self.latency],
            **({} if self.planned is None else {"planned": self.planned.outcome()}),
        }

    def outcome(self) -> dict[str, object]:
        """What was decided, and what that is predicted to cost, as in allocation.json."""
        costs, dense = _cost(self.predicted), _cost(self.problem.shape)

        def row(names: dict[str, str], key: Key, what: str, count: int) -> dict[str, object]:
            return {**names, what: count, **({"damage": self.damage[key]} if key in self.damage else {})}

        kept, ranks = self.widths.kept.items(), self.widths.ranks.items()
        return {
            "predicted": costs,
            "ratio": {name: costs[name] / dense[name] for name in dense},
            "widths": [row({"module": key[0], "unit": key[1]}, key, "kept", count) for key, count in kept],
            "ranks": [row({"linear": name}, (name, RANK), "rank", rank) for name, rank in ranks],
        }

    def _latency(self, table: LatencyTable) -> LatencyBudget:
        budget, measured = self.problem.budget, self.settled.measured.get(table.target)
        return LatencyBudget(
            target=table.target,
            batch=table.batch,
            threads=table.threads,
            dense_ms=table.dense_ms,
            requested=budget.latency_share(table),
            reachable=(table.ratio(self.problem.narrowest), 1.0),
            predicted=table.ratio(self.widths),
            measured=measured,
            met=None if measured is None else budget.latency_met(table, measured),
            correction=table.correction,
        )


def allocate(problem: Problem, candidates: Sequence[Candidate] = (), check: Check | None = None) -> Allocation:
    """The allocation: of least damage by some candidates, or uniform without any; nothing of the model is changed.

    Where widths follow from scores over all layers it is the uniform one, which these then redistribute.

    Args:
        problem: with latency, where the budget names it.
        candidates: of every site, what some widths do to the output.
        check: measures latency; None leaves the tables' word for it.

    Raises:
        BudgetError: as `settle`.
    """
    planned, choices, budget = Allocation.uniform(problem), problem.choices, problem.budget
    weigh = problem.method.allocation.weigh
    if problem.by_global_scores:
        return planned

    def pick(costs: Costs) -> Widths:
        uniform = problem.uniform_at(costs)
        # A budget below the narrowest widths that were measured leaves little to choose: all layers shrink alike.
        if weigh is not None and candidates and budget.met_by(costs.of(narrowest(candidates, choices))):
            return weigh(candidates, choices, costs, budget, uniform)
        return uniform

    settled = settle(pick, problem.costs, budget, check)
    return replace(
        planned,
        settled=settled,
        damage=Damages(candidates).all(choices.chosen(settled.widths)),
        front=front(candidates, choices, settled.costs, next(iter(budget.most), "params")),
    )


def _cost(shape: ModelShape) -> dict[str, int]:
    return {"params": shape.params, "macs": shape.macs, "bytes": shape.size_bytes}
