"""Compress: calibrate → reduce, factorise, score → allocate → plan and masked model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from toolchain.compress.allocate import Costs, Key, Limits, solve_global, top_indices
from toolchain.compress.closed_form import damage_share, likelihood_for, reduce_closed_form, what_matters
from toolchain.compress.decide import Latency, decide, settle
from toolchain.compress.gates import learn_gates
from toolchain.compress.lowrank import FACTORISATIONS, factorise
from toolchain.compress.method import DATA_AWARE, HIDDEN, Allocation, allocate, choices_for, closed_sites, effective
from toolchain.compress.neurons import CRITERIA, Evidence, Scores
from toolchain.compress.solver import Site, key_of
from toolchain.cost import RANK, Widths, trace
from toolchain.data import DataSource
from toolchain.errors import BudgetError, DataError, RecipeError
from toolchain.model import Made, MaskedModel, TimmModel
from toolchain.outputs import WORDS
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.progress import SILENT, Progress
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.surgery.mask import add_masks, baked, mask_model
from toolchain.training.stages import light_augmentation, require_labels


@dataclass(frozen=True)
class Compress:
    """TimmModel → MaskedModel, whose plan is the outcome; its facts are the allocation: what is kept, and what that costs.

    Attributes:
        section, budget: of the recipe; a synthetic source turns the section into its `effective` form.
        source: calibration and training images.
        multiples: unit → multiple, the strictest of the recipe's targets.
        checkpoint, key: of training, where the method trains.
        progress: told how far the stage is.
        latency: tables of the targets on which the budget limits latency, and how widths are timed.
    """

    section: CompressSection
    budget: BudgetSection
    source: DataSource
    multiples: Mapping[str, int]
    checkpoint: Path | None = None
    key: str = ""
    progress: Progress = SILENT
    latency: Latency = field(default_factory=Latency)
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
            self.source.check_classes(given.label_classes)
        if self.method.neurons == "taylor" and given.output != "logits":
            raise RecipeError(
                f"compress.neurons = 'taylor' follows the loss of classes, and the outputs are {WORDS[given.output]}; "
                "use 'obs' or 'variance'"
            )
        measured = self.method.attention in ("joint", DATA_AWARE) or self.method.neurons in (
            "obs",
            "variance",
            "taylor",
        )
        if measured and not len(self.source.split("calibration")):
            raise DataError(f"compress.method = {self.method.method!r} needs calibration images")

    def decide(self, given: TimmModel) -> Allocation:
        """The widths, their predicted cost and damage, before anything is reduced."""
        method, share = self.method, self._damage_share(given)
        part = self.progress.part(0.0, share or 1.0)
        return decide(given, method, self.budget, self.multiples, self.source, self.latency, part.at)

    def __call__(self, given: TimmModel) -> Made[MaskedModel, Allocation]:
        """The masked model."""
        section = self.method
        allocation = self.decide(given)
        choices = choices_for(given.module, given.family, given.groups, section, self.multiples)
        sites = closed_sites(choices, given.family, given.module, section)
        widths = allocation.widths
        module = copy.deepcopy(given.module)
        if section.attention in FACTORISATIONS:
            factorise(module, widths.ranks, section.attention)
        closed, facts = self._closed_form(given, module, sites, allocation)
        scored = [group for group in choices.groups if group.unit == HIDDEN and section.neurons != "obs"]
        if not scored:
            masked = mask_model(given, module, self._plan(given, widths, closed, {}, 0.0, facts))
            return Made(masked, allocation.decided(masked.plan, masked.groups))
        add_masks(module, self._plan(given, widths, closed, {}, 0.0, facts), given.groups)
        scores = self._scores(given, module)
        module, threshold, outcome = baked(module), 0.0, None
        if section.allocation == "global":
            fixed = Widths({key: kept for key, kept in widths.kept.items() if key[1] != HIDDEN}, widths.ranks)
            part = replace(choices, groups=scored)
            costs, limits, found = allocation.costs, allocation.limits, []

            def pick(known: Costs) -> Widths:
                found.append(solve_global(part, known, limits, scores, fixed))
                return found[-1][0]

            outcome = settle(pick, costs, limits, self.latency)
            widths = outcome.widths
            threshold = next(score for kept, score in found if kept == widths)
        masked = mask_model(given, module, self._plan(given, widths, closed, scores, threshold, facts))
        decided = allocation.decided(masked.plan, masked.groups)
        if outcome is not None:  # of the widths that the scores gave
            decided = replace(decided, costs=outcome.costs, measured=outcome.measured)
        return Made(masked, decided)

    def _closed_form(
        self, given: TimmModel, module: nn.Module, sites: Sequence[Site], allocation: Allocation
    ) -> tuple[Mapping[Key, tuple[int, ...]], dict[str, Any]]:
        """(kept positions, what was chosen) after the closed-form reductions, in place."""
        widths, dense = allocation.widths, allocation.dense
        wanted = {**widths.kept, **{(linear, RANK): rank for linear, rank in widths.ranks.items()}}
        touched = [site for site in sites if key_of(site) in wanted]
        if not touched:
            return {}, {}
        keys = {key_of(site): wanted[key_of(site)] for site in touched}
        part = self.progress.part(self._damage_share(given), 1.0)
        likelihood = likelihood_for(given, self.source)
        cares = allocation.cares or what_matters(given, dense, self.source, self.method, likelihood)
        return reduce_closed_form(
            given, module, touched, keys, dense, self.source, self.method, cares, likelihood, part.at
        )

    def _damage_share(self, given: TimmModel) -> float:
        shape = trace(given.module, given.family, given.preprocess.input_size)
        choices = choices_for(given.module, given.family, given.groups, self.method, self.multiples)
        sites = closed_sites(choices, given.family, given.module, self.method)
        images = 0 if self.source.synthetic else len(self.source.split("calibration"))
        return damage_share(self.method, shape.macs, len(sites), images)

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
            likelihood_for(given, self.source),
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
            if rank < min(out, into):
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
        costs = Costs(trace(given.module, given.family, given.preprocess.input_size), given.groups)
        cost = costs.of(Widths.of(made.plan))  # latency is measured, not predicted
        if not Limits.of(self.budget, costs).met_by(cost):
            raise BudgetError(f"the plan misses the budget: {cost['params']:,} parameters, {cost['macs']:,} MACs")


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
