"""What a recipe's [compress] and [budget] mean for a model: names, choices, and the allocation that is predicted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from toolchain.artifact import TimmModel
from toolchain.compress.allocate import Choices, Limits, solve_uniform
from toolchain.compress.lowrank import FACTORISATIONS
from toolchain.compress.neurons import CRITERIA
from toolchain.cost import ModelShape, Widths, trace
from toolchain.errors import RecipeError
from toolchain.families import Family, UnitGroup
from toolchain.plan import CompressionPlan
from toolchain.recipe import BudgetSection, CompressSection

ALLOCATIONS = ("uniform", "global", "solver")
HIDDEN, HEAD_DIM = "mlp_hidden", "head_dim"


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
    """Raises RecipeError for a method that is unknown, or an allocation that does not go with the others."""
    tables = {
        "attention": ("joint", *FACTORISATIONS, "none"),
        "neurons": ("obs", *CRITERIA, "vtp", "none"),
        "allocation": ALLOCATIONS,
    }
    for name, known in tables.items():
        if (value := getattr(section, name)) not in known:
            raise RecipeError(f"compress.{name} = {value!r} is not in this version; it has {', '.join(known)}")
    scored = section.neurons in (*CRITERIA, "vtp")
    if section.allocation == "solver" and (scored or section.attention in FACTORISATIONS):
        raise RecipeError(
            "compress.allocation = 'solver' weighs closed-form reductions: it goes with attention 'joint' or 'none' and "
            f"neurons 'obs' or 'none', not with {section.attention!r} and {section.neurons!r}; use 'uniform' or 'global'"
        )
    if section.allocation == "global" and not scored and section.neurons != "none":
        raise RecipeError(
            f"compress.allocation = 'global' compares scores of neurons over layers, which {section.neurons!r} does not "
            "give; use 'solver' or 'uniform'"
        )


@dataclass(frozen=True)
class Allocation:
    """How wide each layer stays, and what that is predicted to cost.

    Attributes:
        widths: the decision; with `learned`, the uniform one until `decided` puts the plan's in its place. Both stay
            within the budget; neither the single widths nor their sum need be equal.
        dense, predicted, smallest: shapes of the dense model, of `widths`, and of the least that is reachable.
        learned: whether the final widths depend on learned or measured scores.
        planned: the allocation before the decision, where that changed it.
    """

    widths: Widths
    dense: ModelShape
    predicted: ModelShape
    smallest: ModelShape
    learned: bool
    planned: Allocation | None = None

    def decided(self, plan: CompressionPlan, groups: Iterable[UnitGroup]) -> Allocation:
        """This allocation with the widths of a plan that was made from it, on a model with these groups."""
        groups = tuple(groups)
        found = Widths.of(plan)
        totals = {(group.module, group.unit): group.total for group in groups}
        whole = {key: totals[key] for key in self.widths.kept}  # a plan does not name what it leaves whole
        widths = Widths({**whole, **found.kept}, found.ranks)
        if widths == self.widths:
            return self
        return replace(self, widths=widths, predicted=self.dense.shrunk(widths, groups), planned=self)

    def to_dict(self) -> dict[str, Any]:
        """The content of allocation.json."""

        def cost(shape: ModelShape) -> dict[str, int]:
            return {"params": shape.params, "macs": shape.macs, "bytes": shape.size_bytes}

        def outcome(predicted: ModelShape, widths: Widths) -> dict[str, Any]:
            costs = cost(predicted)
            return {
                "predicted": costs,
                "ratio": {name: costs[name] / dense[name] for name in dense},
                "widths": [
                    {"module": module, "unit": unit, "kept": kept} for (module, unit), kept in widths.kept.items()
                ],
                "ranks": [{"linear": name, "rank": rank} for name, rank in widths.ranks.items()],
            }

        dense, smallest = cost(self.dense), cost(self.smallest)
        before = self.planned
        return {
            "schema": "slimvit.allocation/1",
            "learned": self.learned,
            "dense": dense,
            "reachable": {name: [smallest[name] / dense[name], 1.0] for name in dense},
            **outcome(self.predicted, self.widths),
            **({} if before is None else {"planned": outcome(before.predicted, before.widths)}),
        }


def choices_for(
    module: nn.Module,
    family: Family,
    groups: tuple[UnitGroup, ...],
    section: CompressSection,
    multiples: Mapping[str, int],
) -> Choices:
    """What the section reduces on this model: neurons, head dims ("joint"), or attention linears (a factorisation)."""
    linears: dict[str, tuple[int, int]] = {}
    if section.attention in FACTORISATIONS:
        for item in family.factorizable(module):
            if item.kind == "attention":
                out, into = module.get_submodule(item.linear).weight.shape  # type: ignore[misc]
                linears[item.linear] = (int(out), int(into))
    wanted = [HEAD_DIM] * (section.attention == "joint") + [HIDDEN] * (section.neurons != "none")
    units = [group for group in groups if group.unit in wanted]
    floor = 1 - section.vtp.max_prune_ratio if section.neurons == "vtp" else 0.0
    return Choices(units, linears, multiples, floor, section.attention_share)


def allocate(
    model: TimmModel, section: CompressSection, budget: BudgetSection, multiples: Mapping[str, int]
) -> Allocation:
    """The uniform allocation within a budget, from shapes alone: nothing is read from the weights.

    Raises:
        RecipeError: a method is unknown, or nothing may be reduced.
        BudgetError: out of reach; the message names the reachable range.
    """
    check_names(section)
    dense = trace(model.module, model.family, model.preprocess.input_size)
    choices = choices_for(model.module, model.family, model.groups, section, multiples)
    wants_something = (section.attention, section.neurons) != ("none", "none")
    if wants_something and not choices.groups and not choices.linears:
        limits = "; ".join(model.family.limits(model.module))
        raise RecipeError(f"nothing of {model.ref.name} can be reduced by this method{': ' + limits if limits else ''}")
    widths = solve_uniform(choices, dense, model.groups, Limits.of(budget, dense))
    predicted = dense.shrunk(widths, model.groups)
    smallest = dense.shrunk(choices.uniform(0.0), model.groups)
    return Allocation(widths, dense, predicted, smallest, learned=section.allocation != "uniform")
