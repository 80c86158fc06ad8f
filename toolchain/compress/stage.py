"""Compress: calibrate → reduce, factorise, score → allocate → plan and masked model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from toolchain.artifact import MaskedModel, TimmModel
from toolchain.compress.allocate import Key, Limits, solve_global, top_indices
from toolchain.compress.closed_form import reduce_closed_form, solve_widths
from toolchain.compress.gates import learn_gates
from toolchain.compress.lowrank import factorise
from toolchain.compress.method import HEAD_DIM, HIDDEN, allocate, choices_for, effective
from toolchain.compress.neurons import CRITERIA, Evidence, Scores
from toolchain.cost import Widths, trace
from toolchain.data import DataSource
from toolchain.errors import BudgetError, DataError
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.surgery.mask import add_masks, baked, mask_model
from toolchain.training.stages import OnProgress, light_augmentation, require_labels


@dataclass(frozen=True)
class Compress:
    """TimmModel → MaskedModel, whose plan is the outcome.

    Attributes:
        section, budget: of the recipe; a synthetic source turns the section into its `effective` form.
        source: calibration and training images.
        multiples: unit → multiple, the strictest of the recipe's targets.
        checkpoint, key, progress: of training, where the method trains.
        report: receives (share done, text) of the closed form.
    """

    section: CompressSection
    budget: BudgetSection
    source: DataSource
    multiples: Mapping[str, int]
    checkpoint: Path | None = None
    key: str = ""
    progress: OnProgress | None = None
    report: Callable[[float, str], None] | None = None
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
        measured = self.method.attention == "joint" or self.method.neurons in ("obs", "variance", "taylor")
        if measured and not len(self.source.split("calibration")):
            raise DataError(f"compress.method = {self.method.method!r} needs calibration images")

    def __call__(self, given: TimmModel) -> MaskedModel:
        """The masked model."""
        section = self.method
        allocation = allocate(given, section, self.budget, self.multiples)
        choices = choices_for(given.module, given.family, given.groups, section, self.multiples)
        limits, widths = Limits.of(self.budget, allocation.dense), allocation.widths
        if section.allocation == "solver" and choices.groups:
            widths = solve_widths(given, choices, allocation.dense, limits, self.source, self._told)
        module = copy.deepcopy(given.module)
        factorise(module, widths.ranks, section.attention)
        closed, facts = self._closed_form(given, module, widths)
        scored = [group for group in choices.groups if group.unit == HIDDEN and section.neurons != "obs"]
        if not scored:
            return mask_model(given, module, self._plan(given, widths, closed, {}, 0.0, facts))
        add_masks(module, self._plan(given, widths, closed, {}, 0.0, facts), given.groups)
        scores = self._scores(given, module)
        module, threshold = baked(module), 0.0
        if section.allocation == "global":
            fixed = Widths({key: kept for key, kept in widths.kept.items() if key[1] != HIDDEN}, widths.ranks)
            part = replace(choices, groups=scored)
            widths, threshold = solve_global(part, allocation.dense, given.groups, limits, scores, fixed)
        return mask_model(given, module, self._plan(given, widths, closed, scores, threshold, facts))

    def _closed_form(
        self, given: TimmModel, module: nn.Module, widths: Widths
    ) -> tuple[Mapping[Key, tuple[int, ...]], dict[str, Any]]:
        """(kept positions, what was chosen) after the reductions of "joint" and "obs", in place."""
        units = set()
        if self.method.attention == "joint":
            units.add(HEAD_DIM)
        if self.method.neurons == "obs":
            units.add(HIDDEN)
        wanted = {key: kept for key, kept in widths.kept.items() if key[1] in units}
        if not wanted:
            return {}, {}
        return reduce_closed_form(given, module, wanted, self.source, self._told)

    def _told(self, share: float, text: str) -> None:
        if self.report is not None:
            self.report(share, text)

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

    def _plan(
        self,
        given: TimmModel,
        widths: Widths,
        closed: Mapping[Key, tuple[int, ...]],
        scores: Scores,
        threshold: float,
        facts: Mapping[str, Any],
    ) -> CompressionPlan:
        """The plan of some widths; units that cannot be sliced are masked below the threshold that the others met."""
        section = self.method
        keeps = []
        for group in given.groups:
            key = (group.module, group.unit)
            if key in closed and len(closed[key]) < group.total:
                parts = (closed[key],) * group.partitions
                keeps.append(Keep(module=group.module, unit=group.unit, total=group.total, indices=parts))
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
            "closed_form": dict(facts),
            "requested": self.section.method,
            "budget": self.budget.model_dump(mode="json"),
            "multiples": dict(self.multiples),
            "data": self.source.identity,
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
