"""A budget → how wide each layer stays: limits, the reachable range, uniform widths and a global threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from toolchain.cost import RANK, LatencyTable, ModelShape, Widths, pair_pays
from toolchain.errors import BudgetError
from toolchain.families import UnitGroup
from toolchain.recipe import (
    BudgetSection,
)
from toolchain.settings import (
    parse_latency,
    parse_size,
)

Key = tuple[str, str]
"""(module, unit) of a unit, (linear, "rank") of a linear that is factorised."""
Worth = Callable[[Key, int, int], float]
"""What widening a unit from one width to another is worth; more is done first."""
TOLERANCE = 0.05
"""By how much, as a share of a latency limit, the measured latency may lie above it; all other limits are exact."""


@dataclass(frozen=True)
class Costs:
    """What widths cost, in everything that a budget can limit; each is a sum over units.

    Attributes:
        dense: the dense shape.
        groups: all unit groups of the model.
        tables: measured latency, one table for each target.
    """

    dense: ModelShape
    groups: tuple[UnitGroup, ...]
    tables: tuple[LatencyTable, ...] = ()

    @property
    def whole(self) -> dict[str, float]:
        """What the dense model itself costs, as in `of`: the whole that shares of a budget refer to.

        `of(Widths())` is a little less: what ships has its LayerScales folded away, whatever is kept.
        """
        times = {f"latency.{table.target}": table.dense_ms for table in self.tables}
        return {"params": self.dense.params, "macs": self.dense.macs, "size": self.dense.size_bytes, **times}

    def shape(self, widths: Widths) -> ModelShape:
        """The shape that some widths leave."""
        return self.dense.shrunk(widths, self.groups)

    def of(self, widths: Widths) -> dict[str, float]:
        """Name of a limit → cost: "params", "macs", "size" in bytes, "latency.<target>" in ms."""
        shape = self.shape(widths)
        times = {f"latency.{table.target}": table.dense_ms * table.ratio(widths) for table in self.tables}
        return {"params": shape.params, "macs": shape.macs, "size": shape.size_bytes, **times}

    def corrected(self, widths: Widths, measured: Mapping[str, float]) -> Costs:
        """The same costs with latency tables that predict what was measured: target → ratio to dense."""
        tables = tuple(
            table.corrected(widths, measured[table.target]) if table.target in measured else table
            for table in self.tables
        )
        return replace(self, tables=tables)


@dataclass(frozen=True)
class Limits:
    """The most that a compressed model may cost: name of a cost, as in `Costs.of`, → limit. No entry is no limit."""

    most: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(budget: BudgetSection, costs: Costs) -> Limits:
        """The limits that a budget means for a dense model; latency is limited on the targets that costs have tables of."""
        whole: Mapping[str, float] = costs.whole
        most: dict[str, float] = {}
        for name, share in (("params", budget.params), ("macs", budget.macs)):
            if share is not None:
                most[name] = float(math.floor(share * whole[name]))
        if budget.size is not None:
            value, is_share = parse_size(budget.size)
            most["size"] = float(math.floor(value * whole["size"] if is_share else value))
        for target, text in budget.latency.items():
            if (name := f"latency.{target}") in whole:
                value, is_share = parse_latency(text)
                most[name] = value * whole[name] if is_share else value
        return Limits(most)

    def met_by(self, cost: Mapping[str, float]) -> bool:
        """Whether a cost stays within every limit."""
        return all(cost[name] <= limit for name, limit in self.most.items())

    def latency_share(self, table: LatencyTable) -> float:
        """The most that latency on one target may be, as a share of the dense model's."""
        return self.most[f"latency.{table.target}"] / table.dense_ms

    def latency_met(self, table: LatencyTable, measured: float) -> bool:
        """Whether a measured share of the dense model's latency keeps the limit, up to `TOLERANCE`."""
        return measured <= self.latency_share(table) * (1 + TOLERANCE)

    def require(self, narrowest: Widths, costs: Costs) -> None:
        """Raises BudgetError if even the narrowest widths miss a limit; the message names the reachable range."""
        least, whole = costs.of(narrowest), costs.whole
        parts = []
        for name, limit in self.most.items():
            if limit < least[name]:
                parts.append(
                    f"budget.{name} asks for {_shown(name, limit)} ({limit / whole[name]:.3f} of dense); reachable is "
                    f"{_shown(name, least[name])} … {_shown(name, whole[name])} ({least[name] / whole[name]:.3f} … 1)"
                )
        if parts:
            raise BudgetError(f"the budget cannot be met: {'; '.join(parts)}")


def _shown(name: str, value: float) -> str:
    return f"{value:.3f} ms" if name.startswith("latency.") else f"{int(value):,}"


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
        multiple = self.multiples.get(RANK, 1)
        exact = {name: share * out * into / (out + into) for name, (out, into) in self.linears.items()}
        return {name: max(multiple, int(rank) // multiple * multiple) for name, rank in exact.items()}

    def uniform(self, share: float, attention: float | None = None) -> Widths:
        """Neurons at `share`; head dims and factorised linears at `attention`, which is the same if it is absent."""
        if attention is None:
            attention = share if self.attention_share is None else self.attention_share
        shares = {"head_dim": attention}
        kept = {(g.module, g.unit): self.kept(g, shares.get(g.unit, share) * g.total) for g in self.groups}
        return self.widths({**kept, **{(name, RANK): rank for name, rank in self.ranks(attention).items()}})

    def widths(self, chosen: Mapping[Key, int]) -> Widths:
        """What was chosen for each unit and linear, as widths; a rank that would not pay leaves its linear whole."""
        kept = {key: count for key, count in chosen.items() if key[0] not in self.linears}
        ranks = {name: count for (name, _), count in chosen.items() if name in self.linears}
        return Widths(kept, {name: rank for name, rank in ranks.items() if pair_pays(rank, *self.linears[name])})

    def chosen(self, widths: Widths) -> dict[Key, int]:
        """The inverse of `widths`, with everything that may be reduced; a whole linear has its full rank."""
        kept = {(g.module, g.unit): widths.kept.get((g.module, g.unit), g.total) for g in self.groups}
        return {**kept, **{(name, RANK): widths.ranks.get(name, min(shape)) for name, shape in self.linears.items()}}

    def wider(self, key: Key, count: int) -> int | None:
        """The next width, one multiple on; None for what is whole."""
        if key[0] in self.linears:
            out, into = self.linears[key[0]]
            rank = count + self.multiples.get(RANK, 1)
            return rank if pair_pays(rank, out, into) else None if count >= min(out, into) else min(out, into)
        total = next(group.total for group in self.groups if (group.module, group.unit) == key)
        return min(total, count + self.multiples.get(key[1], 1)) if count < total else None


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


def solve_uniform(choices: Choices, costs: Costs, limits: Limits) -> Widths:
    """The widest uniform widths within the limits, alike in all layers up to one multiple.

    Raises:
        BudgetError: even the narrowest do not fit; the message names the reachable range.
    """
    share = largest(0.0, 1.0, lambda x: limits.met_by(costs.of(choices.uniform(x))))
    if share is None:
        limits.require(choices.uniform(0.0), costs)
        raise AssertionError("the narrowest widths meet every limit")
    # Ranks step coarsely where a target wants multiples: what that leaves of the budget widens the units.
    rank_share = share if choices.attention_share is None else choices.attention_share
    units = largest(share, 1.0, lambda x: limits.met_by(costs.of(choices.uniform(x, rank_share))))
    widths = choices.uniform(share if units is None else units, rank_share)
    chosen = choices.chosen(widths)
    wholes = choices.chosen(Widths())
    free = [key for key in chosen if choices.attention_share is None or key[1] not in ("head_dim", RANK)]
    return fill(choices, costs, limits, chosen, free, lambda key, kept, _: -kept / wholes[key])


def fill(
    choices: Choices, costs: Costs, limits: Limits, chosen: Mapping[Key, int], free: Sequence[Key], worth: Worth
) -> Widths:
    """Widths with the slack that rounding left handed out, one multiple at a time, most worth first.

    Args:
        choices: what may be reduced, and the multiples.
        costs: a sum over units; only what one unit's widening adds is computed in each step.
        limits: what must hold.
        chosen: the width of every unit and linear.
        free: those that may be widened.
        worth: of a widening, from one width to the next.
    """
    chosen, names = dict(chosen), list(limits.most)
    most = np.array([limits.most[name] for name in names])
    known: dict[tuple[Key, int], np.ndarray[tuple[int], np.dtype[np.float64]]] = {}

    def total(widths: Widths) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        cost = costs.of(widths)
        return np.array([cost[name] for name in names], dtype=np.float64)

    def alone(key: Key, kept: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
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
        if not limits.met_by(costs.of(choices.widths(chosen))):  # the last bit of a sum of floats
            chosen[best[1]] = before
            free = [key for key in free if key != best[1]]


def solve_global(
    choices: Choices, costs: Costs, limits: Limits, scores: Mapping[Key, Tensor], fixed: Widths
) -> tuple[Widths, float]:
    """(widths that keep the highest scores over all layers within the limits, the score threshold that they mean).

    Args:
        choices: what may be reduced.
        costs: what widths cost.
        limits: the budget.
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

    count = largest(1, len(ordered), lambda x: limits.met_by(costs.of(choices.widths(chosen(x)))))
    if count is None:
        limits.require(choices.widths(chosen(1)), costs)
        raise AssertionError("the narrowest widths meet every limit")
    sums = {key: torch.cat([torch.zeros(1).double(), _best_first(scores[key]).cumsum(0)]) for key in scores}

    def worth(key: Key, kept: int, wider: int) -> float:
        return float(sums[key][wider] - sums[key][kept])

    free = [(g.module, g.unit) for g in choices.groups]
    return fill(choices, costs, limits, chosen(count), free, worth), float(ordered[int(count) - 1])


def _best_first(scores: Tensor) -> Tensor:
    return scores.double().sort(descending=True, stable=True).values


def top_indices(scores: Tensor, count: int) -> tuple[int, ...]:
    """Positions of the `count` highest scores, ascending; equal scores keep the lower position."""
    order = scores.double().sort(descending=True, stable=True).indices[:count]
    return tuple(sorted(order.tolist()))
