"""Which candidate of each unit: the knapsack over measured damage, within any number of limits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from toolchain.compress.allocate import Choices, Costs, Key, Limits, fill, solve_uniform
from toolchain.cost import RANK, Widths
from toolchain.families import Factorizable, UnitGroup

GAP = 1e-4
SCALE = 1e3
"""The objective of a choice that is known; far above what HiGHS takes for equal."""
MARGINS = (0.0, 1e-6)
"""How far inside its limits the knapsack is sought, as a share of dense: HiGHS holds a row to about 1e-7 only."""
Site = UnitGroup | Factorizable
"""What is reduced: a unit's positions, or a linear's rank."""


def key_of(site: Site) -> Key:
    """(module, unit) of a group, (linear, "rank") of a linear."""
    return (site.linear, RANK) if isinstance(site, Factorizable) else (site.module, site.unit)


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
    """What stands for 0 where a logarithm is taken."""
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


def choose(candidates: Sequence[Candidate], choices: Choices, costs: Costs, limits: Limits) -> Widths:
    """The widths of least total damage within the limits: one candidate per unit (multiple-choice knapsack).

    Every cost is a sum over units, so a limit is one linear row. HiGHS stops on its gap, never on time. What the ladder
    of candidates leaves of the budget is handed out in single multiples, each where it mends most damage for its cost.

    Raises:
        BudgetError: no choice meets the limits; the message names the reachable range.
    """
    limits.require(narrowest(candidates, choices), costs)
    whole = costs.of(Widths())
    alone = [costs.of(choices.widths({c.key: c.kept})) for c in candidates]
    saved = {name: np.array([1 - cost[name] / whole[name] for cost in alone]) for name in limits.most}
    damages = Damages(candidates)
    values = np.array([damages.of(c.key, c.kept) for c in candidates])
    keys = list(dict.fromkeys(c.key for c in candidates))
    start = choices.chosen(solve_uniform(choices, costs, limits))
    chosen = {key: start[key] for key in keys}
    known_damage = sum(damages.of(key, kept) for key, kept in chosen.items())
    for margin in MARGINS:
        rows = [(saved[name], 1 - limit / whole[name] + margin) for name, limit in limits.most.items()]
        found = _knapsack(candidates, values, rows, known_damage)
        if found is not None and limits.met_by(costs.of(choices.widths(found))):
            if sum(damages.of(key, kept) for key, kept in found.items()) <= known_damage:
                chosen = found
            break

    @functools.cache
    def cost_of(key: Key, kept: int) -> dict[str, float]:
        return costs.of(choices.widths({key: kept}))

    def worth(key: Key, kept: int, wider: int) -> float:
        before, after = cost_of(key, kept), cost_of(key, wider)
        price = max((after[name] - before[name]) / whole[name] for name in limits.most) if limits.most else 1.0
        return (damages.of(key, kept) - damages.of(key, wider)) / max(price, 1e-12)

    return fill(choices, costs, limits, {**choices.chosen(Widths()), **chosen}, list(chosen), worth)


def _knapsack(
    candidates: Sequence[Candidate],
    damage: np.ndarray[tuple[int], np.dtype[np.float64]],
    rows: Sequence[tuple[np.ndarray[tuple[int], np.dtype[np.float64]], float]],
    known_damage: float,
) -> dict[Key, int] | None:
    """One candidate per unit of least total damage that saves enough in every row; None if there is none.

    HiGHS compares in absolute terms (a gap of 1e-6), and damages span many orders of magnitude. So they are measured by
    what a known choice costs, and a candidate that alone costs more is left out.
    """
    keys = list(dict.fromkeys(c.key for c in candidates))
    one_each = np.array([[float(c.key == key) for c in candidates] for key in keys])
    affordable = damage <= known_damage
    found = milp(
        np.where(affordable, damage / max(known_damage, 1e-300), 0.0) * SCALE,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            *(LinearConstraint(saved[None], wanted, np.inf) for saved, wanted in rows),
        ],
        integrality=np.ones(len(candidates), dtype=np.int64),
        bounds=Bounds(0, affordable.astype(np.float64)),
        options={"mip_rel_gap": GAP, "node_limit": 100_000},
    )
    return None if found.x is None else {c.key: c.kept for c, x in zip(candidates, found.x, strict=True) if x > 0.5}
