"""Compress: calibrate → reduce, factorise, score → allocate → plan and masked model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

from toolchain.compress.allocation import Allocation, Check, Settled, allocate, settle
from toolchain.compress.choices import Budget, Costs, Key
from toolchain.compress.closed_form import (
    ClosedForm,
    Work,
    likelihood_for,
    reduce_closed_form,
    teacher_for,
    weigh,
)
from toolchain.compress.criteria import Evidence, Lessons, Scores
from toolchain.compress.factorisations import factorise
from toolchain.compress.method import HIDDEN
from toolchain.compress.outcome import PrunedShare
from toolchain.compress.problem import Problem
from toolchain.compress.sensitivity import Teacher
from toolchain.compress.solver import Candidate, narrowest, solve_global, top_indices
from toolchain.cost import RANK, Widths
from toolchain.data import DataSource
from toolchain.errors import BudgetError
from toolchain.families import Block, UnitGroup
from toolchain.model import Made, MaskedModel
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.progress import SILENT, Progress
from toolchain.recipe import ANY, BudgetSection
from toolchain.surgery.mask import add_masks, baked, mask_model
from toolchain.training.stages import light_augmentation


@dataclass(frozen=True)
class Weighing:
    """Candidates with their measured damage; none if the method does not weigh widths.

    Attributes:
        candidates: the widths, with their damage.
        teacher: what they were weighed with; None where that was not kept.
    """

    candidates: Sequence[Candidate] = ()
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Compress:
    """Problem → MaskedModel, whose plan is the outcome; its facts are the allocation: what is kept, and what that costs.

    Attributes:
        source: calibration and training images.
        check: measures latency, where the budget names any; None leaves the tables' word for it.
        checkpoint, key: of training, as in `fit`, where the method trains.
        progress: told how far it is.
        weighing: what `weigh` found, for this problem or one that differs in its budget alone; None weighs.
    """

    source: DataSource
    check: Check | None = None
    checkpoint: Path | None = None
    key: str = ""
    progress: Progress = SILENT
    weighing: Weighing | None = None

    def requires(self, problem: Problem) -> None:
        """Raises RecipeError, DataError or ModelError if the method cannot be carried out on this model and data."""
        problem.method.require(self.source, problem.dense)

    def decide(self, problem: Problem) -> tuple[Allocation, Teacher | None]:
        """(the widths, their predicted cost and damage, what damage was weighed with) before anything is reduced.

        Raises:
            RecipeError, BudgetError: as `Problem.require_latency` and `allocate`.
        """
        problem.require_latency()
        problem.require_files()
        weighing = self.weighing or self._weighed(problem, self._work(problem))
        return allocate(self._option(problem, weighing), weighing.candidates, self.check), weighing.teacher

    @staticmethod
    def _option(problem: Problem, weighing: Weighing) -> Problem:
        """The precision of least damage, by widths and rounding together, among those whose file could meet the budget."""
        options, candidates = problem.options, weighing.candidates
        if len(options) == 1:
            return options[0]

        def rank(one: Problem) -> tuple[bool, float]:
            """Least damage first; where no measured width fits, damage says nothing of widths, and the widest comes first."""
            if not one.budget.met_by(one.costs.of(narrowest(candidates, one.choices))):
                return True, -one.costs.of(one.uniform)["params"]
            return False, allocate(one, candidates).total

        return min(options, key=rank)

    def weigh(self, problem: Problem) -> Weighing:
        """The damage of each width, which does not depend on the budget; raises DataError or ModelError as `teacher_for`."""
        return self._weighed(problem, replace(self._work(problem), passes=0.0))

    def _weighed(self, problem: Problem, work: Work) -> Weighing:
        if not problem.method.weighs or not problem.sites:
            return Weighing()
        teacher = teacher_for(problem, self.source, work.part(self.progress, "teacher"))
        return Weighing(weigh(problem, teacher, self.source, work.part(self.progress, "damage")), teacher)

    def __call__(self, problem: Problem) -> Made[MaskedModel, Allocation]:
        """The masked model."""
        planned, teacher = self.decide(problem)
        problem = planned.problem
        dense, method, widths = problem.dense, problem.method, planned.widths
        module = copy.deepcopy(dense.module)
        if method.factorisation is not None and method.factorisation.factorise is not None:
            factorise(module, widths.ranks, method.factorisation.factorise)
        closed, facts = self._closed_form(problem, module, widths, teacher)
        plan = _plan(problem, self.source, _keeps(dense.groups, closed), widths, facts)
        hidden = [group for group in problem.choices.groups if group.unit == HIDDEN and method.scored]
        if not hidden:
            return Made(mask_model(dense, module, plan), planned.decided(plan))
        add_masks(module, plan, dense.groups)
        scores = self._scores(problem, module)
        module, threshold, settled = baked(module), 0.0, None
        if method.allocation.over_layers:
            settled, threshold = self._redistributed(problem, hidden, scores, widths)
            widths = settled.widths
        kept = {**closed, **_highest(problem, scores, widths, threshold)}
        plan = _plan(problem, self.source, _keeps(dense.groups, kept), widths, facts)
        return Made(mask_model(dense, module, plan), planned.decided(plan, settled))

    def _redistributed(
        self, problem: Problem, hidden: Sequence[UnitGroup], scores: Scores, widths: Widths
    ) -> tuple[Settled, float]:
        """(the widths at which the highest scores over all layers stay, the score that the last of them has)."""
        fixed = Widths({key: kept for key, kept in widths.kept.items() if key[1] != HIDDEN}, widths.ranks)
        part, thresholds = replace(problem.choices, groups=hidden), list[tuple[Widths, float]]()

        def pick(known: Costs) -> Widths:
            thresholds.append(solve_global(part, known, problem.budget, scores, fixed))
            return thresholds[-1][0]

        settled = settle(pick, problem.costs, problem.budget, self.check)
        return settled, next(score for kept, score in thresholds if kept == settled.widths)

    def _closed_form(
        self, problem: Problem, module: nn.Module, widths: Widths, teacher: Teacher | None
    ) -> tuple[Mapping[Key, tuple[int, ...]], ClosedForm | None]:
        """(kept positions, what was chosen) after the closed-form reductions, in place."""
        wanted = {**widths.kept, **{(linear, RANK): rank for linear, rank in widths.ranks.items()}}
        if not problem.sites_of(wanted):
            return {}, None
        work = self._work(problem)
        teacher = teacher or teacher_for(problem, self.source, work.part(self.progress, "teacher"))
        return reduce_closed_form(problem, teacher, module, wanted, self.source, work.part(self.progress, "passes"))

    def _work(self, problem: Problem) -> Work:
        work = Work.of(problem, len(self.source.split("calibration")))
        if self.weighing is None:
            return work
        return replace(work, damage=0.0, teacher=0.0 if self.weighing.teacher else work.teacher)

    def _scores(self, problem: Problem, module: nn.Module) -> Scores:
        dense, criterion = problem.dense, problem.method.criterion
        assert criterion is not None
        assert criterion.score is not None
        everything = criterion.every_unit and problem.method.factorisation is None
        groups = [g for g in dense.groups if g.unit == HIDDEN or (everything and g.partitions == 1)]
        lessons = None
        if criterion.needs.training:
            lessons = Lessons(
                self.source.split("train"),
                likelihood_for(dense, self.source),
                **light_augmentation(self.source, dense),
                checkpoint=self.checkpoint,
                key=self.key,
                progress=self.progress,
            )
        calibration = self.source.split("calibration")
        return criterion.score(Evidence(module, groups, calibration, problem.method.section, lessons))

    def ensures(self, problem: Problem, masked: MaskedModel) -> None:
        """Raises BudgetError if the plan, once sliced and split, would not stay within the budget."""
        untimed = replace(problem.costs, tables=())  # latency is measured, not predicted
        cost = untimed.of(Widths.of(masked.plan))
        request = problem.request
        if ANY in request.files:  # the plan says which it became
            request = BudgetSection.model_validate(masked.plan.provenance["budget"])
        if not Budget.of(request, untimed).met_by(cost):
            raise BudgetError(f"the plan misses the budget: {cost['params']:,} parameters, {cost['macs']:,} MACs")


def _highest(problem: Problem, scores: Scores, widths: Widths, threshold: float) -> dict[Key, tuple[int, ...]]:
    """The positions that stay by their scores; of units that cannot be sliced, those above the threshold of the others."""
    kept = {}
    for group in problem.dense.groups:
        key = (group.module, group.unit)
        if key in scores:
            least = max(1, round(problem.method.floor * group.total))
            count = widths.kept.get(key, max(least, int((scores[key] >= threshold).sum())))
            kept[key] = top_indices(scores[key], count)
    return kept


def _keeps(groups: Sequence[UnitGroup], kept: Mapping[Key, tuple[int, ...]]) -> list[Keep]:
    """A plan's decisions: none for what is left whole."""
    return [
        Keep(
            module=group.module,
            unit=group.unit,
            total=group.total,
            indices=(kept[group.module, group.unit],) * group.partitions,
        )
        for group in groups
        if len(kept.get((group.module, group.unit), ())) not in (0, group.total)
    ]


def _plan(
    problem: Problem, source: DataSource, keeps: Sequence[Keep], widths: Widths, facts: ClosedForm | None
) -> CompressionPlan:
    dense, section = problem.dense, problem.method.section
    shapes = {name: dense.module.get_submodule(name).weight.shape for name in widths.ranks}
    lows = [
        LowRank(module=name, shape=(int(shapes[name][0]), int(shapes[name][1])), rank=rank)  # type: ignore[index]
        for name, rank in widths.ranks.items()
        if rank < min(shapes[name])  # type: ignore[arg-type]
    ]
    provenance = {
        "method": section.model_dump(mode="json"),
        "closed_form": {} if facts is None else asdict(facts),
        "requested": section.method,
        "budget": problem.request.model_dump(mode="json"),
        "multiples": dict(problem.choices.multiples),
        "data": source.identity,
        "synthetic": source.synthetic,
        "weights": dict(dense.provenance),
    }
    return CompressionPlan(model=dense.ref, keeps=tuple(keeps), low_ranks=tuple(lows), provenance=provenance)


def pruned_shares(model: MaskedModel) -> list[PrunedShare]:
    """One row per block and kind of unit: how many positions the plan removes, and whether physically.

    A factorised linear counts as kind "rank" with total = min(out, in).
    """
    physical = {(group.module, group.unit): group.sliceable for group in model.groups}
    blocks = model.family.blocks(model.module)
    rows = [
        PrunedShare(
            block=_block(keep.module, blocks),
            kind=keep.unit,
            total=keep.total * len(keep.indices),
            removed=keep.removed,
            physical=physical[keep.module, keep.unit],
        )
        for keep in model.plan.keeps
    ]
    for low in model.plan.low_ranks:
        block, kind, total = _block(low.module, blocks), f"rank.{low.module.rpartition('.')[2]}", min(low.shape)
        rows.append(PrunedShare(block=block, kind=kind, total=total, removed=total - low.rank, physical=True))
    return rows


def _block(module: str, blocks: Sequence[Block]) -> str:
    """The path of the block that a module is, or lies in."""
    return next(block.path for block in blocks if block.holds(module))
