"""What a recipe's [compress] and [budget] mean for a model: names, choices, and the allocation that is predicted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from toolchain.compress.allocate import Choices, Costs, Key, Limits, solve_uniform
from toolchain.compress.lowrank import FACTORISATIONS
from toolchain.compress.neurons import CRITERIA
from toolchain.compress.sensitivity import Sensitivity
from toolchain.compress.solver import Site
from toolchain.cost import RANK, LatencyTable, ModelShape, Widths, trace
from toolchain.errors import RecipeError
from toolchain.families import Factorizable, Family, UnitGroup
from toolchain.model import TimmModel
from toolchain.plan import CompressionPlan
from toolchain.recipe import BudgetSection, CompressSection

ALLOCATIONS = ("uniform", "global", "solver")
HIDDEN, HEAD_DIM = "mlp_hidden", "head_dim"
DATA_AWARE = "data_aware"
CLOSED_FORM = {"attention": ("joint", DATA_AWARE), "neurons": ("obs",)}
"""What the closed form carries out, and so what the switches below speak of."""
SWITCHES = ("refit", "sequential", "sensitivity")


def effective(section: CompressSection, *, synthetic: bool) -> CompressSection:
    """The section as it can be carried out: without real images nothing is learned, and every layer shrinks alike.

    The closed form needs no labels and keeps its shapes on noise; what it fits there means nothing, and the plan says so.
    """
    if not synthetic:
        return section
    learned = section.neurons not in ("none", "obs", "magnitude", "random")
    changed = {"neurons": "magnitude" if learned else section.neurons, "allocation": "uniform"}
    return section.model_copy(update=changed)


def check_names(section: CompressSection) -> None:
    """Raises RecipeError for a method that is unknown, or a key that does not go with the others."""
    tables = {
        "attention": ("joint", DATA_AWARE, *FACTORISATIONS, "none"),
        "neurons": ("obs", *CRITERIA, "vtp", "none"),
        "allocation": ALLOCATIONS,
    }
    for name, known in tables.items():
        if (value := getattr(section, name)) not in known:
            raise RecipeError(f"compress.{name} = {value!r} is not in this version; it has {', '.join(known)}")
    scored = section.neurons in (*CRITERIA, "vtp")
    if section.allocation == "solver" and (scored or section.attention in FACTORISATIONS):
        raise RecipeError(
            "compress.allocation = 'solver' weighs closed-form reductions: it goes with attention 'joint', 'data_aware' or 'none' and "
            f"neurons 'obs' or 'none', not with {section.attention!r} and {section.neurons!r}; use 'uniform' or 'global'"
        )
    if section.allocation == "global" and not scored and section.neurons != "none":
        raise RecipeError(
            f"compress.allocation = 'global' compares scores of neurons over layers, which {section.neurons!r} does not "
            "give; use 'solver' or 'uniform'"
        )
    if not any(getattr(section, name) in closed for name, closed in CLOSED_FORM.items()):
        for name in SWITCHES:
            if not getattr(section, name):
                raise RecipeError(
                    f"compress.{name} = false has nothing to switch off: it goes with attention 'joint' or 'data_aware', or "
                    f"neurons 'obs', not with {section.attention!r} and {section.neurons!r}; remove it"
                )


@dataclass(frozen=True)
class Allocation:
    """How wide each layer stays, and what that is predicted to cost and to damage.

    Attributes:
        widths: the decision; with `learned`, the uniform one until `decided` puts the plan's in its place. Both stay
            within the budget; neither the single widths nor their sum need be equal.
        costs: what widths cost on this model, with latency as far as it was measured.
        limits: the budget.
        narrowest: the least that is reachable.
        learned: whether the final widths depend on learned or measured scores.
        damage: unit or linear → what its width does to the output, measured alone: mean KL divergence per image, nats.
        measured: target → latency of a model of these widths over that of the dense model, measured.
        cares: branch module → what the output cares about, where damage was weighed by it; to be used again.
        planned: the allocation before the decision, where that changed it.
    """

    widths: Widths
    costs: Costs
    limits: Limits
    narrowest: Widths
    learned: bool
    damage: Mapping[Key, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    cares: Mapping[str, Sensitivity] = field(default_factory=dict, repr=False, compare=False)
    planned: Allocation | None = None

    @property
    def dense(self) -> ModelShape:
        """The dense shape."""
        return self.costs.dense

    @property
    def predicted(self) -> ModelShape:
        """The shape that `widths` leave."""
        return self.costs.shape(self.widths)

    @property
    def smallest(self) -> ModelShape:
        """The least shape that is reachable."""
        return self.costs.shape(self.narrowest)

    def decided(self, plan: CompressionPlan, groups: Iterable[UnitGroup]) -> Allocation:
        """This allocation with the widths of a plan that was made from it, on a model with these groups."""
        found = Widths.of(plan)
        totals = {(group.module, group.unit): group.total for group in groups}
        whole = {key: totals[key] for key in self.widths.kept}  # a plan does not name what it leaves whole
        widths = Widths({**whole, **found.kept}, found.ranks)
        if widths == self.widths:
            return self
        # What is only zeroed takes its time all the same: widths that differ in nothing else were timed already.
        same = all(widths.kept[key] == count for key, count in self.widths.kept.items())
        timed = self.measured if same and widths.ranks == self.widths.ranks else {}
        return replace(self, widths=widths, damage={}, measured=timed, planned=self)

    def to_dict(self) -> dict[str, Any]:
        """The content of allocation.json."""

        def cost(shape: ModelShape) -> dict[str, int]:
            return {"params": shape.params, "macs": shape.macs, "bytes": shape.size_bytes}

        def row(names: dict[str, str], key: Key, what: str, count: int, damage: Mapping[Key, float]) -> dict[str, Any]:
            return {**names, what: count, **({"damage": damage[key]} if key in damage else {})}

        def outcome(part: Allocation) -> dict[str, Any]:
            costs, kept, ranks = cost(part.predicted), part.widths.kept, part.widths.ranks
            return {
                "predicted": costs,
                "ratio": {name: costs[name] / dense[name] for name in dense},
                "widths": [
                    row({"module": key[0], "unit": key[1]}, key, "kept", count, part.damage)
                    for key, count in kept.items()
                ],
                "ranks": [
                    row({"linear": name}, (name, RANK), "rank", rank, part.damage) for name, rank in ranks.items()
                ],
            }

        dense, smallest = cost(self.dense), cost(self.smallest)
        return {
            "schema": "slimvit.allocation/1",
            "learned": self.learned,
            "dense": dense,
            "reachable": {name: [smallest[name] / dense[name], 1.0] for name in dense},
            **outcome(self),
            "damage": sum(self.damage.values()) if self.damage else None,
            "latency": [self._latency(table) for table in self.costs.tables],
            **({} if self.planned is None else {"planned": outcome(self.planned)}),
        }

    def _latency(self, table: LatencyTable) -> dict[str, Any]:
        """One target's part of allocation.json; ratios are times over the dense model's, "met" is None unmeasured."""
        measured = self.measured.get(table.target)
        return {
            "target": table.target,
            "batch": table.batch,
            "threads": table.threads,
            "dense_ms": table.dense_ms,
            "requested": self.limits.latency_share(table),
            "reachable": [table.ratio(self.narrowest), 1.0],
            "predicted": table.ratio(self.widths),
            "measured": measured,
            "met": None if measured is None else self.limits.latency_met(table, measured),
            "correction": table.correction,
        }


def attention_linears(
    module: nn.Module, family: Family, groups: Sequence[UnitGroup], section: CompressSection
) -> list[Factorizable]:
    """The linears of attention that become low-rank products.

    All of them by "data_aware" or another factorisation; by "joint" those of an attention whose head dims cannot be
    rotated, for which a pair of matmuls is what is left; none by "none".
    """
    if section.attention == "none":
        return []
    jointly = section.attention == "joint"
    rotated = tuple(f"{g.module}." for g in groups if jointly and g.unit == HEAD_DIM and g.mixable)
    found = (item for item in family.factorizable(module) if item.kind == "attention")
    return [item for item in found if not item.linear.startswith(rotated)]


def choices_for(
    module: nn.Module,
    family: Family,
    groups: tuple[UnitGroup, ...],
    section: CompressSection,
    multiples: Mapping[str, int],
) -> Choices:
    """What the section reduces on this model: neurons, head dims ("joint"), or attention linears (a factorisation)."""
    linears: dict[str, tuple[int, int]] = {}
    for item in attention_linears(module, family, groups, section):
        out, into = module.get_submodule(item.linear).weight.shape  # type: ignore[misc]
        linears[item.linear] = (int(out), int(into))
    wanted = [HEAD_DIM] * (section.attention == "joint") + [HIDDEN] * (section.neurons != "none")
    units = [group for group in groups if group.unit in wanted and (group.mixable or group.unit != HEAD_DIM)]
    floor = 1 - section.vtp.max_prune_ratio if section.neurons == "vtp" else 0.0
    return Choices(units, linears, multiples, floor, section.attention_share)


def closed_sites(choices: Choices, family: Family, module: nn.Module, section: CompressSection) -> list[Site]:
    """What the closed form reduces: head dims and low ranks of "joint" and "data_aware", neurons of "obs"."""
    units = [HEAD_DIM] * (section.attention == "joint") + [HIDDEN] * (section.neurons == "obs")
    groups = [group for group in choices.groups if group.unit in units]
    if section.attention not in CLOSED_FORM["attention"]:
        return [*groups]
    return [*groups, *(item for item in family.factorizable(module) if item.linear in choices.linears)]


def allocate(
    model: TimmModel,
    section: CompressSection,
    budget: BudgetSection,
    multiples: Mapping[str, int],
    tables: Iterable[LatencyTable] = (),
) -> Allocation:
    """The uniform allocation within a budget, from shapes alone: nothing is read from the weights.

    Args:
        model: the dense model.
        section: what is reduced.
        budget: its latency is limited on the targets of `tables`, and not looked at elsewhere.
        multiples: unit → multiple.
        tables: measured latency.

    Raises:
        RecipeError: a method is unknown, or nothing may be reduced.
        BudgetError: out of reach; the message names the reachable range.
    """
    check_names(section)
    costs = Costs(trace(model.module, model.family, model.preprocess.input_size), model.groups, tuple(tables))
    choices = choices_for(model.module, model.family, model.groups, section, multiples)
    wants_something = (section.attention, section.neurons) != ("none", "none")
    if wants_something and not choices.groups and not choices.linears:
        limits = "; ".join(model.family.limits(model.module))
        raise RecipeError(f"nothing of {model.ref.name} can be reduced by this method{': ' + limits if limits else ''}")
    allowed = Limits.of(budget, costs)
    widths = solve_uniform(choices, costs, allowed)
    return Allocation(widths, costs, allowed, choices.uniform(0.0), learned=section.allocation != "uniform")
