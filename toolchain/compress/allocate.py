"""A budget → how wide each layer stays: limits, the reachable range, uniform widths and a global threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.cost import ModelShape, Widths
from toolchain.errors import BudgetError, RecipeError
from toolchain.families import UnitGroup
from toolchain.recipe import BudgetSection, parse_size

Key = tuple[str, str]


@dataclass(frozen=True)
class Limits:
    """The most that a compressed model may have; None for no limit."""

    params: int | None = None
    macs: int | None = None
    size_bytes: int | None = None

    @staticmethod
    def of(budget: BudgetSection, dense: ModelShape) -> Limits:
        """The limits that a budget means for a dense model.

        Raises:
            RecipeError: the budget limits latency, which needs measured tables.
        """
        if budget.latency:
            raise RecipeError("budget.latency is not available in this version; use params, macs or size")
        size = None
        if budget.size is not None:
            value, is_share = parse_size(budget.size)
            size = math.floor(value * dense.size_bytes) if is_share else math.floor(value)
        return Limits(
            None if budget.params is None else math.floor(budget.params * dense.params),
            None if budget.macs is None else math.floor(budget.macs * dense.macs),
            size,
        )

    def met_by(self, shape: ModelShape) -> bool:
        """Whether a shape stays within every limit."""
        return all(limit is None or getattr(shape, name) <= limit for name, limit in vars(self).items())

    def explain(self, smallest: ModelShape, dense: ModelShape) -> str:
        """Which limits are out of reach, with the reachable range of each."""
        parts = []
        for name, limit in vars(self).items():
            least, most = getattr(smallest, name), getattr(dense, name)
            if limit is not None and limit < least:
                what = "size" if name == "size_bytes" else name
                parts.append(
                    f"budget.{what} asks for {limit:,} ({limit / most:.3f} of dense); "
                    f"reachable is {least:,} … {most:,} ({least / most:.3f} … 1)"
                )
        return "; ".join(parts)


@dataclass(frozen=True)
class Choices:
    """What may be reduced, and how far.

    Attributes:
        groups: the sliceable units that are reduced.
        linears: linear → (out, in) of those that are factorised.
        multiples: unit name, or "rank" → multiple that kept counts are rounded down to.
        floor: least share of a unit's positions that a layer keeps.
        attention_share: share of the attention that is left; None follows the common share.
    """

    groups: Sequence[UnitGroup]
    linears: Mapping[str, tuple[int, int]]
    multiples: Mapping[str, int]
    floor: float = 0.0
    attention_share: float | None = None

    def kept(self, group: UnitGroup, count: float) -> int:
        """`count` positions of a unit, rounded down to its multiple and held within the floor and the total."""
        multiple = self.multiples.get(group.unit, 1)
        least = math.ceil(max(1.0, self.floor * group.total) / multiple) * multiple
        rounded = group.total if count >= group.total else int(count) // multiple * multiple
        return min(group.total, max(least, rounded))

    def ranks(self, share: float) -> dict[str, int]:
        """The rank of each linear at which a pair holds `share` of its parameters; none at a share of 1."""
        if share >= 1:
            return {}
        multiple = self.multiples.get("rank", 1)
        exact = {name: share * out * into / (out + into) for name, (out, into) in self.linears.items()}
        return {name: max(multiple, int(rank) // multiple * multiple) for name, rank in exact.items()}

    def uniform(self, share: float, attention: float | None = None) -> Widths:
        """Neurons at `share`; head dims and factorised linears at `attention`, which is the same if it is absent."""
        if attention is None:
            attention = share if self.attention_share is None else self.attention_share
        shares = {"head_dim": attention}
        kept = {(g.module, g.unit): self.kept(g, shares.get(g.unit, share) * g.total) for g in self.groups}
        return Widths(kept, self.ranks(attention))


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


def solve_uniform(choices: Choices, dense: ModelShape, groups: Iterable[UnitGroup], limits: Limits) -> Widths:
    """The widest uniform widths within the limits.

    Raises:
        BudgetError: even the narrowest do not fit; the message names the reachable range.
    """
    groups = tuple(groups)
    share = largest(0.0, 1.0, lambda x: limits.met_by(dense.shrunk(choices.uniform(x), groups)))
    if share is None:
        smallest = dense.shrunk(choices.uniform(0.0), groups)
        raise BudgetError(f"the budget cannot be met: {limits.explain(smallest, dense)}")
    # Ranks step coarsely where a target wants multiples: what that leaves of the budget widens the units.
    rank_share = share if choices.attention_share is None else choices.attention_share
    units = largest(share, 1.0, lambda x: limits.met_by(dense.shrunk(choices.uniform(x, rank_share), groups)))
    return choices.uniform(share if units is None else units, rank_share)


def solve_global(
    choices: Choices,
    dense: ModelShape,
    groups: Iterable[UnitGroup],
    limits: Limits,
    scores: Mapping[Key, Tensor],
    fixed: Widths,
) -> tuple[Widths, float]:
    """(widths that keep the highest scores over all layers within the limits, the score threshold that they mean).

    Args:
        choices: what may be reduced.
        dense: the dense shape.
        groups: all unit groups of the model.
        limits: the budget.
        scores: (module, unit) → importance [total] for each of `choices.groups`; higher is kept.
        fixed: what is already decided, of units and ranks that are not scored.
    """
    groups = tuple(groups)
    values = torch.cat([scores[g.module, g.unit].double() for g in choices.groups])
    ordered, order = values.sort(descending=True, stable=True)
    owners = torch.repeat_interleave(torch.tensor([g.total for g in choices.groups]))[order]

    def widths(count: float) -> Widths:
        # Counted by rank and not by value: neurons of equal score, dead ones above all, can be told apart.
        numbers = torch.bincount(owners[: int(count)], minlength=len(choices.groups)).tolist()
        kept = {(g.module, g.unit): choices.kept(g, n) for g, n in zip(choices.groups, numbers, strict=True)}
        return Widths({**fixed.kept, **kept}, fixed.ranks)

    def fits(candidate: Widths) -> bool:
        return limits.met_by(dense.shrunk(candidate, groups))

    count = largest(1, len(ordered), lambda x: fits(widths(x)))
    if count is None:
        raise BudgetError(f"the budget cannot be met: {limits.explain(dense.shrunk(widths(1), groups), dense)}")
    return _fill(widths(count), choices, scores, fits), float(ordered[int(count) - 1])


def _fill(widths: Widths, choices: Choices, scores: Mapping[Key, Tensor], fits: Callable[[Widths], bool]) -> Widths:
    """The same widths with the slack that rounding left handed out, one multiple at a time, best next score first."""
    kept = dict(widths.kept)
    while True:
        candidates = []
        for group in choices.groups:
            key, step = (group.module, group.unit), choices.multiples.get(group.unit, 1)
            if kept[key] + step <= group.total:
                best = scores[key].double().sort(descending=True, stable=True).values
                candidates.append((-float(best[kept[key] : kept[key] + step].sum()), key, step))
        for _, key, step in sorted(candidates):
            grown = Widths({**kept, key: kept[key] + step}, widths.ranks)
            if fits(grown):
                kept[key] += step
                break
        else:
            return Widths(kept, widths.ranks)


def top_indices(scores: Tensor, count: int) -> tuple[int, ...]:
    """Positions of the `count` highest scores, ascending; equal scores keep the lower position."""
    order = scores.double().sort(descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))
