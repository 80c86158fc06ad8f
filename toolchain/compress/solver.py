"""Which widths cost the least accuracy within a budget: measured damage per candidate, then a knapsack.

For each block and unit a ladder of widths is tried on the otherwise dense model; the damage of a candidate is the
KL divergence of the stitched model's output from the dense one's, on held-out images, from a cached prefix. One candidate
per unit is then chosen by a multiple-choice knapsack (HiGHS).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.compress.allocate import Choices, Key, Limits
from toolchain.compress.branches import REDUCTIONS, advance, first_residual
from toolchain.cost import ModelShape, Widths
from toolchain.errors import BudgetError
from toolchain.families import Branch, Family, UnitGroup

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


def kl_divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean over images of KL(softmax(reference) ‖ softmax(logits)), both [B, K]."""
    ours, theirs = (functional.log_softmax(x.double(), dim=1) for x in (logits, reference))
    return float(functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


@torch.no_grad()
def measure(
    dense: nn.Module,
    family: Family,
    choices: Choices,
    shares: Sequence[float],
    calibration: Dataset[tuple[Tensor, int]],
    held_out: Dataset[tuple[Tensor, int]],
    progress: Callable[[float, str], None] | None = None,
) -> list[Candidate]:
    """The damage of every candidate of every unit.

    Args:
        dense: the model; left as it is.
        family: its declaration.
        choices: the units that may shrink, and their multiples.
        shares: the widths to try, as shares of a unit.
        calibration: images that statistics are taken from.
        held_out: images that damage is measured on.
        progress: receives (share done, text).
    """
    work = copy.deepcopy(dense)
    blocks = family.branches(dense)
    flat = [(block, branch) for block, branches in blocks.items() for branch in branches]
    groups = {group.module: group for group in choices.groups}
    fit, probe = (first_residual(dense, flat[0][0], images) for images in (calibration, held_out))
    reference = finish(dense, family, probe, [branch for _, branch in flat])
    found: list[Candidate] = []
    for index, (block, branch) in enumerate(flat):
        rest = [later for _, later in flat[index + 1 :]]
        if (group := groups.get(branch.module)) is not None:
            rows = family.read_tokens(dense) if block == flat[-1][0] else None
            reduction = REDUCTIONS[group.unit](work, branch, group, fit, rows)
            for kept in ladder(group, choices, shares):
                damage = 0.0
                if kept < group.total:
                    reduction.apply(kept)
                    after = [advance(work, branch, x) for x in probe]
                    damage = max(0.0, kl_divergence(finish(dense, family, after, rest), reference))
                found.append(Candidate((group.module, group.unit), kept, damage))
            work.get_submodule(branch.module).load_state_dict(dense.get_submodule(branch.module).state_dict())
        for batches in (fit, probe):
            batches[:] = [advance(dense, branch, x) for x in batches]
        if progress is not None:
            progress((index + 1) / len(flat), f"damage of {branch.module}")
    return found


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


def finish(model: nn.Module, family: Family, batches: Sequence[Tensor], branches: Sequence[Branch]) -> Tensor:
    """Logits [B, K] of all batches, from the residual stream before the first of the remaining branches."""
    logits = []
    for batch in batches:
        x = batch
        for branch in branches:
            x = advance(model, branch, x)
        logits.append(family.head(model, x))
    return torch.cat(logits)


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
