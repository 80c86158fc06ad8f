"""A budget → how wide each layer stays: uniform widths, a global threshold, or the knapsack over measured damage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from toolchain.compress.choices import Budget, Choices, Costs, Key, Site, key_of
from toolchain.cost import RANK, Widths
from toolchain.families import Factorizable
from toolchain.registry import Registry

Worth = Callable[[Key, int, int], float]
"""(unit, width, next width) → the worth of that widening; the highest worth is done first."""
GAP = 1e-4
SCALE = 1e3
"""Scale of the MILP objective: the known feasible choice costs 1000, so that HiGHS's absolute gap of 1e-6 is negligible."""
MARGINS = (0.0, 1e-6)
"""Safety margins to the budget that are tried in turn, as shares of dense: HiGHS keeps a row only to about 1e-7."""


def largest(low: float, high: float, fits: Callable[[float], bool]) -> float | None:
    """The largest x in [low, high] that fits, by bisection, where fitting is monotone; None if not even `low` fits."""
    if fits(high):
        return high
    if not fits(low):
        return None
    while high - low > 1e-6 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def solve_uniform(choices: Choices, costs: Costs, budget: Budget) -> Widths:
    """The widest uniform widths within the budget, alike in all layers up to one multiple.

    Raises:
        BudgetError: even the narrowest do not fit; the message names the reachable range.
    """
    share = largest(0.0, 1.0, lambda x: budget.met_by(costs.of(choices.uniform(x))))
    if share is None:
        budget.require(choices.uniform(0.0), costs)
        raise AssertionError("the narrowest widths meet every budget")
    # Ranks step coarsely where a target wants multiples: what that leaves of the budget widens the units.
    rank_share = share if choices.attention_share is None else choices.attention_share
    units = largest(share, 1.0, lambda x: budget.met_by(costs.of(choices.uniform(x, rank_share))))
    widths = choices.uniform(share if units is None else units, rank_share)
    chosen = choices.chosen(widths)
    wholes = choices.chosen(Widths())
    free = [key for key in chosen if choices.attention_share is None or key[1] not in ("head_dim", RANK)]
    return fill(choices, costs, budget, chosen, free, lambda key, kept, _: -kept / wholes[key])


def fill(
    choices: Choices, costs: Costs, budget: Budget, chosen: Mapping[Key, int], free: Sequence[Key], worth: Worth
) -> Widths:
    """Widths with the slack that rounding left handed out, one multiple at a time, most worth first.

    Args:
        choices: what may be reduced, and the multiples.
        costs: a sum over units; only what one unit's widening adds is computed in each step.
        budget: what must hold.
        chosen: the width of every unit and linear.
        free: those that may be widened.
        worth: of a widening, from one width to the next.
    """
    chosen, names = dict(chosen), list(budget.most)
    most = np.array([budget.most[name] for name in names])
    known: dict[tuple[Key, int], NDArray[np.float64]] = {}

    def total(widths: Widths) -> NDArray[np.float64]:
        cost = costs.of(widths)
        return np.array([cost[name] for name in names], dtype=np.float64)

    def alone(key: Key, kept: int) -> NDArray[np.float64]:
        if (key, kept) not in known:
            known[key, kept] = total(choices.widths({key: kept}))
        return known[key, kept]

    while True:
        used, best = total(choices.widths(chosen)), None
        for key in free:
            if (wider := choices.wider(key, chosen[key])) is None:
                continue
            if (used + alone(key, wider) - alone(key, chosen[key]) <= most).all():
                value = worth(key, chosen[key], wider)
                if best is None or value > best[0]:
                    best = value, key, wider
        if best is None:
            return choices.widths(chosen)
        before = chosen[best[1]]
        chosen[best[1]] = best[2]
        if not budget.met_by(costs.of(choices.widths(chosen))):  # the last bit of a sum of floats
            chosen[best[1]] = before
            free = [key for key in free if key != best[1]]


def solve_global(
    choices: Choices, costs: Costs, budget: Budget, scores: Mapping[Key, Tensor], fixed: Widths
) -> tuple[Widths, float]:
    """(widths that keep the highest scores over all layers within the budget, the score threshold that they mean).

    Args:
        choices: what may be reduced.
        costs: what widths cost.
        budget: the most that they may cost.
        scores: (module, unit) → importance [total] for each of `choices.groups`; higher is kept.
        fixed: what is already decided, of units and ranks that are not scored.
    """
    values = torch.cat([scores[g.module, g.unit].double() for g in choices.groups])
    ordered, order = values.sort(descending=True, stable=True)
    owners = torch.repeat_interleave(torch.tensor([g.total for g in choices.groups]))[order]
    before = {**fixed.kept, **{(name, RANK): rank for name, rank in fixed.ranks.items()}}

    def chosen(count: float) -> dict[Key, int]:
        # Counted by rank and not by value: neurons of equal score, dead ones above all, can be told apart.
        numbers = torch.bincount(owners[: int(count)], minlength=len(choices.groups)).tolist()
        kept = {(g.module, g.unit): choices.kept(g, n) for g, n in zip(choices.groups, numbers, strict=True)}
        return {**before, **kept}

    count = largest(1, len(ordered), lambda x: budget.met_by(costs.of(choices.widths(chosen(x)))))
    if count is None:
        budget.require(choices.widths(chosen(1)), costs)
        raise AssertionError("the narrowest widths meet every budget")
    sums = {key: torch.cat([torch.zeros(1).double(), _best_first(scores[key]).cumsum(0)]) for key in scores}

    def worth(key: Key, kept: int, wider: int) -> float:
        return float(sums[key][wider] - sums[key][kept])

    free = [(g.module, g.unit) for g in choices.groups]
    return fill(choices, costs, budget, chosen(count), free, worth), float(ordered[int(count) - 1])


def _best_first(scores: Tensor) -> Tensor:
    return scores.double().sort(descending=True, stable=True).values


def top_indices(scores: Tensor, count: int) -> tuple[int, ...]:
    """Positions of the `count` highest scores, ascending; equal scores keep the lower position."""
    order = scores.double().sort(descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))


@dataclass(frozen=True)
class Candidate:
    """One width of one unit, and what choosing it does to the output: mean KL divergence per image."""

    key: Key
    kept: int
    damage: float


def ladder(site: Site, choices: Choices, shares: Sequence[float]) -> list[int]:
    """The widths, or ranks, at some shares, ascending, each a multiple that the targets prefer; the last is the whole."""
    if isinstance(site, Factorizable):
        pairs = {choices.ranks(share)[site.linear] for share in shares if share < 1}
        return [*sorted(pairs), min(choices.linears[site.linear])]
    return sorted({choices.kept(site, share * site.total) for share in (*shares, 1.0)})


class Damages:
    """The damage of every unit at any width, from candidates at some.

    Damage is close to exponential in width: its logarithm is interpolated linearly, and below the narrowest candidate it
    is held. It never rises with width: a measured bump is noise, not a reason to keep less.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        own: dict[Key, dict[int, float]] = {}
        for candidate in candidates:
            own.setdefault(candidate.key, {})[candidate.kept] = candidate.damage
        self._known = {key: _falling(known) for key, known in own.items()}
        self._logs = {
            key: [float(np.log(max(value, _floor(known)))) for value in known.values()]
            for key, known in self._known.items()
        }

    def of(self, key: Key, kept: int) -> float:
        """The damage of one unit at some width; exactly the candidate's where there is one."""
        known = self._known[key]
        return known[kept] if kept in known else float(np.exp(np.interp(kept, list(known), self._logs[key])))

    def all(self, chosen: Mapping[Key, int]) -> dict[Key, float]:
        """The damage of every unit that was measured, at the chosen widths."""
        return {key: self.of(key, chosen[key]) for key in self._known}


def _falling(known: Mapping[int, float]) -> dict[int, float]:
    widths = sorted(known)
    values = np.maximum.accumulate([known[width] for width in reversed(widths)])[::-1]
    return dict(zip(widths, values.tolist(), strict=True))


def _floor(known: Mapping[int, float]) -> float:
    """The positive number that replaces a damage of 0 in logarithms."""
    return max(1e-12, 1e-3 * min((value for value in known.values() if value > 0), default=1e-9))


def interpolate(
    candidates: Sequence[Candidate], sites: Sequence[Site], choices: Choices, shares: Sequence[float]
) -> list[Candidate]:
    """Candidates at a finer ladder too; below the narrowest measured width nothing is made up."""
    damages, finer = Damages(candidates), []
    for site in sites:
        known = {c.kept for c in candidates if c.key == key_of(site)}
        widths = sorted(width for width in {*known, *ladder(site, choices, shares)} if width >= min(known))
        finer += [Candidate(key_of(site), width, damages.of(key_of(site), width)) for width in widths]
    return finer


def narrowest(candidates: Sequence[Candidate], choices: Choices) -> Widths:
    """The narrowest candidate of every unit."""
    widest_first = sorted(candidates, key=lambda c: -c.kept)
    return choices.widths({c.key: c.kept for c in widest_first})


def choose(candidates: Sequence[Candidate], choices: Choices, costs: Costs, budget: Budget, uniform: Widths) -> Widths:
    """The widths of least total damage within the budget: one candidate per unit (multiple-choice knapsack).

    Every cost is a sum over units, so a budget is one linear row. HiGHS stops on its gap, never on time. What the ladder
    of candidates leaves of the budget is handed out in single multiples, each where it mends most damage for its cost.
    `uniform` is what `solve_uniform` says of the same: a choice that is known to fit, which bounds the search.

    Raises:
        BudgetError: no choice meets the budget; the message names the reachable range.
    """
    budget.require(narrowest(candidates, choices), costs)
    whole = costs.of(Widths())
    alone = [costs.of(choices.widths({c.key: c.kept})) for c in candidates]
    saved = {name: np.array([1 - cost[name] / whole[name] for cost in alone]) for name in budget.most}
    damages = Damages(candidates)
    values = np.array([damages.of(c.key, c.kept) for c in candidates])
    keys = list(dict.fromkeys(c.key for c in candidates))
    start = choices.chosen(uniform)
    chosen = {key: start[key] for key in keys}
    known_damage = sum(damages.of(key, kept) for key, kept in chosen.items())
    for margin in MARGINS:
        rows = [(saved[name], 1 - most / whole[name] + margin) for name, most in budget.most.items()]
        picked = _knapsack(candidates, values, rows, known_damage)
        if picked is not None and budget.met_by(costs.of(choices.widths(picked))):
            if sum(damages.of(key, kept) for key, kept in picked.items()) <= known_damage:
                chosen = picked
            break

    @functools.cache
    def cost_of(key: Key, kept: int) -> dict[str, float]:
        return costs.of(choices.widths({key: kept}))

    def worth(key: Key, kept: int, wider: int) -> float:
        before, after = cost_of(key, kept), cost_of(key, wider)
        price = max((after[name] - before[name]) / whole[name] for name in budget.most) if budget.most else 1.0
        return (damages.of(key, kept) - damages.of(key, wider)) / max(price, 1e-12)

    return fill(choices, costs, budget, {**choices.chosen(Widths()), **chosen}, list(chosen), worth)


def _knapsack(
    candidates: Sequence[Candidate],
    damage: NDArray[np.float64],
    rows: Sequence[tuple[NDArray[np.float64], float]],
    known_damage: float,
) -> dict[Key, int] | None:
    """One candidate per unit of least total damage that saves enough in every row; None if there is none.

    HiGHS compares in absolute terms (a gap of 1e-6), and damages span many orders of magnitude. So they are measured by
    what a known choice costs, and a candidate that alone costs more is left out.
    """
    keys = list(dict.fromkeys(c.key for c in candidates))
    one_each = np.array([[float(c.key == key) for c in candidates] for key in keys])
    affordable = damage <= known_damage
    solution = milp(
        np.where(affordable, damage / max(known_damage, 1e-300), 0.0) * SCALE,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            *(LinearConstraint(saved[None], wanted, np.inf) for saved, wanted in rows),
        ],
        integrality=np.ones(len(candidates), dtype=np.int64),
        bounds=Bounds(0, affordable.astype(np.float64)),
        options={"mip_rel_gap": GAP, "node_limit": 100_000},
    )
    return (
        None if solution.x is None else {c.key: c.kept for c, x in zip(candidates, solution.x, strict=True) if x > 0.5}
    )


@dataclass(frozen=True)
class Allocator:
    """A way to decide how wide each layer stays.

    Attributes:
        name: in recipes, as `compress.allocation`.
        weigh: (what measured widths of every site do to the output, choices, costs, budget, the uniform widths) → widths within
            the budget; None where all layers shrink alike.
        over_layers: whether scores of neurons, compared over all layers, redistribute what stays of them.
    """

    name: str
    weigh: Callable[[Sequence[Candidate], Choices, Costs, Budget, Widths], Widths] | None = None
    over_layers: bool = False


ALLOCATIONS: Registry[Allocator] = Registry(
    "allocation",
    "slimvit.allocations",
    {
        "uniform": Allocator("uniform"),
        "global": Allocator("global", over_layers=True),
        "solver": Allocator("solver", weigh=choose),
    },
)
