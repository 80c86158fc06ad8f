"""Compress: calibrate → factorise → score → allocate → plan and masked model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from toolchain.artifact import MaskedModel, TimmModel
from toolchain.compress.allocate import Choices, Limits, solve_global, solve_uniform, top_indices
from toolchain.compress.gates import learn_gates
from toolchain.compress.lowrank import FACTORISATIONS, factorise
from toolchain.compress.neurons import CRITERIA, Evidence, Scores
from toolchain.cost import ModelShape, Widths, trace
from toolchain.data import DataSource
from toolchain.errors import BudgetError, DataError, RecipeError
from toolchain.families import Family, UnitGroup
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.surgery.mask import baked, mask_model
from toolchain.training.stages import OnProgress, light_augmentation, require_labels

log = logging.getLogger(__name__)
ALLOCATIONS = ("uniform", "global")
HIDDEN = "mlp_hidden"


def effective(section: CompressSection, *, synthetic: bool) -> CompressSection:
    """The section as it can be carried out: without real images nothing is learned, and every layer shrinks alike."""
    if not synthetic or section.method == "none":
        return section
    return section.model_copy(
        update={"neurons": "none" if section.neurons == "none" else "magnitude", "allocation": "uniform"}
    )


def check_names(section: CompressSection) -> None:
    """Raises RecipeError for a method that this version does not have; the message lists those that it has."""
    tables = {
        "attention": (*FACTORISATIONS, "none"),
        "neurons": (*CRITERIA, "vtp", "none"),
        "allocation": ALLOCATIONS,
    }
    for name, known in tables.items():
        if (value := getattr(section, name)) not in known:
            raise RecipeError(
                f"compress.{name} = {value!r} (method {section.method!r}) is not in this version; "
                f"it has {', '.join(known)}. compress.method = 'hybrid' or 'vtp' works."
            )


@dataclass(frozen=True)
class Allocation:
    """How wide each layer stays, and what that is predicted to cost.

    Attributes:
        widths: the decision; with `learned`, widths of the same total that a global threshold will move about.
        dense, predicted, smallest: shapes of the dense model, of the decision, and of the least that is reachable.
        learned: whether the final widths depend on learned or measured scores.
    """

    widths: Widths
    dense: ModelShape
    predicted: ModelShape
    smallest: ModelShape
    learned: bool

    def to_dict(self) -> dict[str, Any]:
        """The content of allocation.json."""

        def cost(shape: ModelShape) -> dict[str, int]:
            return {"params": shape.params, "macs": shape.macs, "bytes": shape.size_bytes}

        dense, predicted, smallest = cost(self.dense), cost(self.predicted), cost(self.smallest)
        return {
            "schema": "slimvit.allocation/1",
            "learned": self.learned,
            "dense": dense,
            "predicted": predicted,
            "ratio": {name: predicted[name] / dense[name] for name in dense},
            "reachable": {name: [smallest[name] / dense[name], 1.0] for name in dense},
            "widths": [
                {"module": module, "unit": unit, "kept": kept} for (module, unit), kept in self.widths.kept.items()
            ],
            "ranks": [{"linear": name, "rank": rank} for name, rank in self.widths.ranks.items()],
        }


def choices_for(
    module: nn.Module,
    family: Family,
    groups: tuple[UnitGroup, ...],
    section: CompressSection,
    multiples: Mapping[str, int],
) -> Choices:
    """What the section reduces on this model: neurons, and attention linears if it factorises them."""
    linears: dict[str, tuple[int, int]] = {}
    if section.attention != "none":
        for item in family.factorizable(module):
            if item.kind == "attention":
                out, into = module.get_submodule(item.linear).weight.shape  # type: ignore[misc]
                linears[item.linear] = (int(out), int(into))
    hidden = [group for group in groups if group.unit == HIDDEN and section.neurons != "none"]
    floor = 1 - section.vtp.max_prune_ratio if section.neurons == "vtp" else 0.0
    return Choices(hidden, linears, multiples, floor, section.attention_share)


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
    if section.method != "none" and not choices.groups and not choices.linears:
        limits = "; ".join(model.family.limits(model.module))
        raise RecipeError(f"nothing of {model.ref.name} can be reduced by this method{': ' + limits if limits else ''}")
    widths = (
        Widths() if section.method == "none" else solve_uniform(choices, dense, model.groups, Limits.of(budget, dense))
    )
    predicted = dense.shrunk(widths, model.groups)
    smallest = dense.shrunk(choices.uniform(0.0), model.groups)
    return Allocation(widths, dense, predicted, smallest, learned=section.allocation == "global")


@dataclass(frozen=True)
class Compress:
    """TimmModel → MaskedModel, whose plan is the outcome.

    Attributes:
        section, budget: of the recipe; a synthetic source turns the section into its `effective` form.
        source: calibration and training images.
        multiples: unit → multiple, the strictest of the recipe's targets.
        checkpoint, key, progress: of training, where the method trains.
    """

    section: CompressSection
    budget: BudgetSection
    source: DataSource
    multiples: Mapping[str, int]
    checkpoint: Path | None = None
    key: str = ""
    progress: OnProgress | None = None
    name: str = "compress"

    @property
    def method(self) -> CompressSection:
        """The section as it is carried out."""
        return effective(self.section, synthetic=self.source.synthetic)

    def requires(self, given: TimmModel) -> None:
        """Raises RecipeError, BudgetError or DataError if the method cannot be carried out on this model and data."""
        allocate(given, self.method, self.budget, self.multiples)
        if self.method.neurons == "vtp":
            require_labels(self.source, "compress.neurons = 'vtp'")
            self.source.check_classes(given.module.num_classes)  # type: ignore[arg-type]
        elif self.method.neurons in ("variance", "taylor") and not len(self.source.split("calibration")):
            raise DataError(f"compress.neurons = {self.method.neurons!r} needs calibration images")

    def __call__(self, given: TimmModel) -> MaskedModel:
        """The masked model."""
        section = self.method
        allocation = allocate(given, section, self.budget, self.multiples)
        module = copy.deepcopy(given.module)
        factorise(module, allocation.widths.ranks, section.attention)
        choices = choices_for(given.module, given.family, given.groups, section, self.multiples)
        if not choices.groups:
            return mask_model(given, module, self._plan(given, allocation.widths, {}, 0.0))
        scores = self._scores(given, module)
        module = baked(module)
        widths, threshold = allocation.widths, 0.0
        if section.allocation == "global":
            limits = Limits.of(self.budget, allocation.dense)
            widths, threshold = solve_global(choices, allocation.dense, given.groups, limits, scores, widths.ranks)
        return mask_model(given, module, self._plan(given, widths, scores, threshold))

    def _scores(self, given: TimmModel, module: nn.Module) -> Scores:
        section = self.method
        hidden = [group for group in given.groups if group.unit == HIDDEN]
        if section.neurons != "vtp":
            return CRITERIA[section.neurons](Evidence(module, hidden, self.source.split("calibration"), section.seed))
        # Alone, VTP gates every kind of dimension, as published; beside low-rank attention only the hidden neurons.
        gated = [g for g in given.groups if g.partitions == 1 and (g in hidden or section.attention == "none")]
        scores, _ = learn_gates(
            module,
            gated,
            self.source.split("train"),
            section.vtp,
            seed=section.seed,
            augment=dict(light_augmentation(self.source, given)),
            checkpoint=self.checkpoint,
            key=self.key,
            progress=self.progress,
        )
        return scores

    def _plan(self, given: TimmModel, widths: Widths, scores: Scores, threshold: float) -> CompressionPlan:
        """The plan of some widths; units that cannot be sliced are masked below the threshold that the others met."""
        section = self.method
        keeps = []
        for group in given.groups:
            key = (group.module, group.unit)
            if key not in scores:
                continue
            if key in widths.kept:
                count = widths.kept[key]
            else:
                least = max(1, round((1 - section.vtp.max_prune_ratio) * group.total))
                count = max(least, int((scores[key] >= threshold).sum()))
            if count < group.total:
                indices = (top_indices(scores[key], count),)
                keeps.append(Keep(module=group.module, unit=group.unit, total=group.total, indices=indices))
        lows = []
        for name, rank in widths.ranks.items():
            out, into = given.module.get_submodule(name).weight.shape  # type: ignore[misc]
            lows.append(LowRank(module=name, shape=(int(out), int(into)), rank=rank))
        provenance = {
            "method": section.model_dump(mode="json"),
            "requested": self.section.method,
            "budget": self.budget.model_dump(mode="json"),
            "multiples": dict(self.multiples),
            "data": {"source": self.source.name.partition(":")[0], "digest": self.source.digest},
            "synthetic": self.source.synthetic,
            "weights": dict(given.provenance),
        }
        return CompressionPlan(model=given.ref, keeps=tuple(keeps), low_ranks=tuple(lows), provenance=provenance)

    def ensures(self, given: TimmModel, made: MaskedModel) -> None:
        """Raises BudgetError if the plan, once sliced and split, would not stay within the budget."""
        dense = trace(given.module, given.family, given.preprocess.input_size)
        limits = Limits.of(self.budget, dense)
        shrunk = dense.shrunk(Widths.of(made.plan), given.groups)
        if not limits.met_by(shrunk):
            raise BudgetError(f"the plan misses the budget: {shrunk.params:,} parameters, {shrunk.macs:,} MACs")


def pruned_shares(model: MaskedModel) -> list[dict[str, Any]]:
    """One row per block and kind of unit: how many positions the plan removes, and whether physically.

    A factorised linear counts as kind "rank" with total = min(out, in).
    """
    rows = []
    for keep in model.plan.keeps:
        group = next(g for g in model.groups if (g.module, g.unit) == (keep.module, keep.unit))
        total = keep.total * len(keep.indices)
        rows.append(
            {
                "block": _block(keep.module),
                "kind": keep.unit,
                "total": total,
                "removed": keep.removed,
                "physical": group.sliceable,
            }
        )
    for low in model.plan.low_ranks:
        total = min(low.shape)
        kind = f"rank.{low.module.rpartition('.')[2]}"
        rows.append(
            {"block": _block(low.module), "kind": kind, "total": total, "removed": total - low.rank, "physical": True}
        )
    return rows


def _block(module: str) -> str:
    return ".".join(module.split(".")[:2])
