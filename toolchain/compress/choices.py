"""What may be reduced (`Choices`), what widths cost (`Costs`), and what they may cost at most (`Budget`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from toolchain.cost import RANK, FileCost, LatencyTable, ModelShape, Widths, pair_pays
from toolchain.errors import BudgetError
from toolchain.families import Factorizable, UnitGroup
from toolchain.recipe import BudgetSection
from toolchain.settings import parse_latency, parse_size

Key = tuple[str, str]
"""(module, unit) of a unit, (linear, "rank") of a linear that is factorised."""
Site = UnitGroup | Factorizable
"""What is reduced: a unit's positions, or a linear's rank."""
ROOM = 0.003
"""The share of a file's budget that is left free: its graph is known from the dense model's, and differs a little with the widths."""
UNREACHABLE = "the budget cannot be met"
TOLERANCE = 0.05
"""Relative amount by which measured latency may exceed a latency budget."""


def key_of(site: Site) -> Key:
    """(module, unit) of a group, (linear, "rank") of a linear."""
    return (site.linear, RANK) if isinstance(site, Factorizable) else (site.module, site.unit)


@dataclass(frozen=True)
class Costs:
    """What widths cost, in everything that a budget can name; each is a sum over units.

    Attributes:
        dense: the dense shape.
        groups: all unit groups of the model.
        tables: measured latency, one table for each target.
        files: what files of other precisions cost, those that the budget speaks of.
    """

    dense: ModelShape
    groups: tuple[UnitGroup, ...]
    tables: tuple[LatencyTable, ...] = ()
    files: tuple[FileCost, ...] = ()

    @property
    def whole(self) -> dict[str, float]:
        """What the dense model itself costs, as in `of`: the whole that shares of a budget refer to.

        `of(Widths())` is a little less: models that ship have no LayerScales.
        """
        times = {f"latency.{table.target}": table.dense_ms for table in self.tables}
        files = dict.fromkeys((file.name for file in self.files), self.dense.size_bytes)
        return {"params": self.dense.params, "macs": self.dense.macs, "size": self.dense.size_bytes, **files, **times}

    def shape(self, widths: Widths) -> ModelShape:
        """The shape that some widths leave."""
        return self.dense.shrunk(widths, self.groups)

    def of(self, widths: Widths) -> dict[str, float]:
        """Name of a budget → cost: "params", "macs", "size" and "size.<precision>" in bytes, "latency.<target>" in ms."""
        shape = self.shape(widths)
        times = {f"latency.{table.target}": table.dense_ms * table.ratio(widths) for table in self.tables}
        files = {file.name: file.bytes_of(shape) for file in self.files}
        return {"params": shape.params, "macs": shape.macs, "size": shape.size_bytes, **files, **times}

    def corrected(self, widths: Widths, measured: Mapping[str, float]) -> Costs:
        """The same costs with latency tables that predict what was measured: target → ratio to dense."""
        tables = tuple(
            table.corrected(widths, measured[table.target]) if table.target in measured else table
            for table in self.tables
        )
        return replace(self, tables=tables)


@dataclass(frozen=True)
class Budget:
    """The most that a compressed model may cost. What has no entry is free.

    Attributes:
        most: name of a cost, as in `Costs.of`, → amount.
        asked: the same of files, before `ROOM` was left free.
    """

    most: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(budget: BudgetSection, costs: Costs) -> Budget:
        """What a recipe's [budget] means for a dense model: of latency and of files, those that costs have tables and sizes of."""
        whole: Mapping[str, float] = costs.whole
        most, asked = dict[str, float](), dict[str, int]()
        for name, share in (("params", budget.params), ("macs", budget.macs)):
            if share is not None:
                most[name] = float(math.floor(share * whole[name]))
        if isinstance(budget.size, str):
            value, is_share = parse_size(budget.size)
            most["size"] = float(math.floor(value * whole["size"] if is_share else value))
        for precision, text in budget.files.items():
            if (name := f"size.{precision}") in whole:
                value, is_share = parse_size(text)
                asked[name] = math.floor(value * whole["size"] if is_share else value)
                most[name] = float(math.floor((1 - ROOM) * asked[name]))
        for target, text in budget.latency.items():
            if (name := f"latency.{target}") in whole:
                value, is_share = parse_latency(text)
                most[name] = value * whole[name] if is_share else value
        return Budget(most, asked)

    def met_by(self, cost: Mapping[str, float]) -> bool:
        """Whether a cost stays within it."""
        return all(cost[name] <= limit for name, limit in self.most.items())

    def latency_share(self, table: LatencyTable) -> float:
        """The most that latency on one target may be, as a share of the dense model's."""
        return self.most[f"latency.{table.target}"] / table.dense_ms

    def latency_met(self, table: LatencyTable, measured: float) -> bool:
        """Whether a measured share of the dense model's latency keeps it, up to `TOLERANCE`."""
        return measured <= self.latency_share(table) * (1 + TOLERANCE)

    def require(self, narrowest: Widths, costs: Costs) -> None:
        """Raises BudgetError if even the narrowest widths miss it; the message names the reachable range."""
        least, widest, whole = costs.of(narrowest), costs.of(Widths()), costs.whole
        parts = []
        for name, limit in self.most.items():
            if limit < least[name]:
                file = name in self.asked
                asked, low, high = (
                    (self.asked[name], math.ceil(least[name] / (1 - ROOM)) + 1, widest[name])
                    if file
                    else (limit, least[name], whole[name])
                )
                parts.append(
                    f"budget.{name} asks for {_shown(name, asked)} ({asked / whole[name]:.3f} of dense); reachable is "
                    f"{_shown(name, low)} … {_shown(name, high)} ({low / whole[name]:.3f} … {high / whole[name]:.3g})"
                )
        if parts:
            raise BudgetError(f"{UNREACHABLE}: {'; '.join(parts)}")


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
