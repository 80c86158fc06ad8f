"""Which candidate of each unit: the knapsack over measured damage, within any number of limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from toolchain.compress.allocate import Choices, Key, Limits
from toolchain.cost import ModelShape, Widths
from toolchain.errors import BudgetError
from toolchain.families import UnitGroup

GAP = 1e-4


@dataclass(frozen=True)
class Candidate:
    """One width of one unit, and what choosing it does to the output: mean KL divergence per image."""

    key: Key
    kept: int
    damage: float


def ladder(group: UnitGroup, choices: Choices, shares: Sequence[float]) -> list[int]:
    """The widths at some shares, ascending, each a multiple that the targets prefer."""
    return sorted({choices.kept(group, share * group.total) for share in shares})


def interpolate(candidates: Sequence[Candidate], choices: Choices, shares: Sequence[float]) -> list[Candidate]:
    """Candidates at a finer ladder: damage is close to exponential in width, so its logarithm is interpolated linearly.

    Below the narrowest measured width nothing is made up, and a measured candidate stays as it is.
    """
    finer: list[Candidate] = []
    for group in choices.groups:
        own = sorted((c for c in candidates if c.key == (group.module, group.unit)), key=lambda c: c.kept)
        floor = max(1e-12, 1e-3 * min((c.damage for c in own if c.damage > 0), default=1e-9))
        known = {c.kept: c.damage for c in own}
        widths, logs = [c.kept for c in own], [float(np.log(max(c.damage, floor))) for c in own]
        for kept in sorted({*known, *ladder(group, choices, shares)}):
            if kept >= own[0].kept:
                damage = known.get(kept, float(np.exp(np.interp(kept, widths, logs))))
                finer.append(Candidate((group.module, group.unit), kept, damage))
    return finer


def choose(
    candidates: Sequence[Candidate], choices: Choices, dense: ModelShape, groups: Sequence[UnitGroup], limits: Limits
) -> Widths:
    """The widths of least total damage within the limits: one candidate per unit (multiple-choice knapsack).

    Every cost is a sum over units, so a limit is one linear row. HiGHS stops on its gap, never on time.

    Raises:
        BudgetError: no choice meets the limits; the message names the reachable range.
    """
    shapes = [dense.shrunk(Widths({c.key: c.kept}), groups) for c in candidates]
    keys = list(dict.fromkeys(c.key for c in candidates))
    one_each = np.array([[float(c.key == key) for c in candidates] for key in keys])
    constraints = [LinearConstraint(one_each, 1, 1)]
    for name, limit in vars(limits).items():
        if limit is not None:
            whole = getattr(dense, name)
            saved = np.array([whole - getattr(shape, name) for shape in shapes], dtype=np.float64) / whole
            constraints.append(LinearConstraint(saved[None], 1 - limit / whole, np.inf))
    damage = _convex_floor(candidates)
    found = milp(
        damage / max(float(damage.max()), 1e-300),
        constraints=constraints,
        integrality=np.ones(len(candidates), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "node_limit": 100_000},
    )
    if found.x is None:
        smallest = dense.shrunk(choices.uniform(0.0), groups)
        raise BudgetError(f"the budget cannot be met: {limits.explain(smallest, dense)}")
    taken = [c for c, x in zip(candidates, found.x, strict=True) if x > 0.5]
    return Widths({c.key: c.kept for c in taken})


def _convex_floor(candidates: Sequence[Candidate]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Damages made non-increasing in width, unit by unit: a measured bump is noise, not a reason to keep less."""
    values = np.array([c.damage for c in candidates], dtype=np.float64)
    for key in dict.fromkeys(c.key for c in candidates):
        rows = [index for index, c in enumerate(candidates) if c.key == key]
        values[rows] = np.maximum.accumulate(values[rows][::-1])[::-1]
    return values
