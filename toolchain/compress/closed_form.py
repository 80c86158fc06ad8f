"""The label-free method end to end: what each width costs, then the sequential pass at the best β."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.compress.branches import captured
from toolchain.compress.choices import Key
from toolchain.compress.damage import Effort, measure, require_way
from toolchain.compress.problem import Problem
from toolchain.compress.sensitivity import Teacher, flat, sensitivities
from toolchain.compress.sequential import Head, Pass, Reduced, reduce_sequentially
from toolchain.compress.solver import Candidate, interpolate
from toolchain.data import DataSource, Images, batches
from toolchain.likelihood import Likelihood, Outputs, divergence_by_image, likelihood_of, outputs_of
from toolchain.model import TimmModel
from toolchain.outputs import FEATURES, Output
from toolchain.progress import SILENT, Progress
from toolchain.recipe import CompressSection
from toolchain.surgery.scales import restore_scales

BETAS = (0.5, 0.0, 1.0)
UNTRIED_BETA = 1.0
"""The β of a model that is too large for trying them all."""
SHARES = (
    (0.05, 0.075, *(0.05 * step for step in range(2, 17)), 0.9),
    (0.15, 0.25, 0.35, 0.5, 0.65, 0.8),
)
"""Ladders of widths that damage is measured at: fine, and for models that are too large for it."""
IMAGES = (16, 256)
"""The fewest and the most held-out images that anything is judged on."""
MEASURE_MACS = 6e12
"""What measuring divergences may cost, and trying β. Sizes follow from this and from shapes, never from a clock."""
SENSITIVITY_MACS = 1e12
"""What the backward pass for the sensitivities may cost."""
LOOKED_AT = 2
"""Images on which running the blocks one after another is compared with calling the model."""
PASSES = 6
"""What one sequential pass costs, in forward passes of the dense model."""
PASS_SHARE = 0.95
"""Share of a pass's work that is the pass itself; the rest judges its outputs on validation images."""
DAMAGE_PASSES = 4
"""What measuring every site of every block costs, in forward passes of the dense model."""
SENSITIVITY_PASSES = 3
"""What a forward and a backward pass cost, in forward passes."""
SPREAD = frozenset[Output]({"regression"}) | FEATURES
"""Kinds of output whose likelihood is estimated on calibration images."""


@dataclass(frozen=True)
class ClosedForm:
    """What was chosen, and the divergences on validation images that it was chosen by.

    Attributes:
        beta: as in `Pass`.
        head_refitted: whether the classifier was.
        kl: "BETA", or "BETA head" → mean KL divergence from the dense model; None where it is not finite.
        dampings: linear that was re-fitted → how far it was held back, chosen over scenes.
    """

    beta: float
    head_refitted: bool
    kl: Mapping[str, float | None]
    dampings: Mapping[str, float]


def _some(images: Images, count: float) -> Images:
    least, most = IMAGES
    return images.spread(int(min(max(count, least), most)))


def effort(macs: int, sites: int) -> Effort:
    """How closely damage is measured within `MEASURE_MACS`: first images are dropped, then widths, then the ladder gets coarser."""
    for shares in SHARES:
        for anchors in (len(shares), 3, 1):
            count = MEASURE_MACS / (macs * _passes(len(shares), anchors, sites))
            if count >= 0.9 * IMAGES[0]:
                return Effort(shares, anchors, count)
    return Effort(SHARES[-1], 1, IMAGES[0])


def _passes(shares: int, anchors: int, sites: int) -> float:
    """Forward passes for each probe image: a divergence runs half of the model on average, a branch alone its share."""
    return 2 + shares + 0.5 * anchors * sites


def betas_for(problem: Problem, images: int) -> tuple[float, ...]:
    """The β to try: as `affordable_betas`; one where every branch has a norm behind it, which is asked for the same at each."""
    dense = problem.dense
    if all(branch.norm is not None for branch in dense.family.branches(dense.module)):
        return (0.0,)
    return affordable_betas(problem.method.section, problem.shape.macs, images)


def affordable_betas(section: CompressSection, macs: int, images: int) -> tuple[float, ...]:
    """All β, if that is affordable, and 1 if not; 0 where there is nothing that β could correct."""
    if not (section.refit and section.sequential):
        return (0.0,)
    return BETAS if len(BETAS) * PASSES * images * macs <= MEASURE_MACS else (UNTRIED_BETA,)


@dataclass(frozen=True)
class Work:
    """Estimated work, in dense forward passes per image; used only for the progress bar.

    Attributes:
        teacher: finding out what the outputs care about.
        damage: measuring what each width does.
        passes: reducing, once for each β.
    """

    teacher: float
    damage: float
    passes: float

    @staticmethod
    def of(problem: Problem, images: int) -> Work:
        """The work on so many calibration images."""
        macs, sites = problem.shape.macs, len(problem.sites)
        judged = _judged(macs)
        teacher = images * (problem.dense.output in SPREAD) + SENSITIVITY_PASSES * _bounded(_asked(macs))
        passes = len(betas_for(problem, images)) * (PASSES * images + judged) + judged
        if not problem.method.weighs or not sites:
            return Work(teacher, 0.0, passes)
        how = effort(macs, sites)
        probes = _bounded(how.images) * _passes(len(how.shares), how.anchors, sites)
        return Work(teacher, DAMAGE_PASSES * min(_fitted(macs), images) + probes, passes)

    @property
    def total(self) -> float:
        """All of it; never 0."""
        return self.teacher + self.damage + self.passes or 1.0

    def part(self, progress: Progress, name: Literal["teacher", "damage", "passes"]) -> Progress:
        """The part of a progress that one of them is."""
        start = {"teacher": 0.0, "damage": self.teacher, "passes": self.teacher + self.damage}[name]
        return progress.part(start / self.total, (start + getattr(self, name)) / self.total)


def _bounded(count: float) -> float:
    return min(max(count, IMAGES[0]), IMAGES[1])


def _asked(macs: int) -> float:
    """How many images sensitivities are taken from, before that is rounded."""
    return SENSITIVITY_MACS / (SENSITIVITY_PASSES * macs)


def _fitted(macs: int) -> int:
    """How many images damage is fitted on, where there are as many."""
    return max(64, int(0.5 * MEASURE_MACS / (4 * macs)))


def _judged(macs: int) -> float:
    """How many images a pass is judged on."""
    return _bounded(0.2 * MEASURE_MACS / macs)


def likelihood_for(dense: TimmModel, source: DataSource) -> Likelihood:
    """The likelihood of a dense model's outputs, as calibration images show them; raises DataError if they never vary."""
    return likelihood_of(dense.output, dense.module, source.split("calibration"))


def teacher_for(problem: Problem, source: DataSource, progress: Progress = SILENT) -> Teacher:
    """The dense model and the sensitivities of its outputs to each branch, from calibration images.

    The sensitivities are flat if the recipe turns them off, or if the images are noise.

    Args:
        problem: the dense model, and how it is looked at.
        source: of calibration images.
        progress: told about every batch.

    Raises:
        DataError: as `likelihood_for`.
        ModelError: as `require_way`.
    """
    dense, section, calibration = problem.dense, problem.method.section, source.split("calibration")
    teacher = Teacher(dense.module, dense.family, likelihood_for(dense, source), {})
    require_way(teacher, dense.ref.name, calibration.spread(LOOKED_AT))
    if not section.sensitivity or source.synthetic:
        tokens = {name: linear.rows for name, linear in problem.shape.linears.items()}
        return replace(teacher, cares=flat(dense.module, dense.family, tokens))
    images = _some(calibration, _asked(problem.shape.macs))
    known = len(calibration) * (dense.output in SPREAD)
    rest = progress.part(known / (known + SENSITIVITY_PASSES * len(images)), 1.0)
    rest.at(0.0, "what the outputs care about")
    cares = sensitivities(dense.module, dense.family, images, section.seed, teacher.likelihood, rest)
    return replace(teacher, cares=cares)


def weigh(problem: Problem, teacher: Teacher, source: DataSource, progress: Progress = SILENT) -> list[Candidate]:
    """Every site at a fine ladder of widths, and what each does to the outputs on held-out images.

    Args:
        problem, teacher: the dense model.
        source: of calibration and validation images.
        progress: told about every branch.
    """
    sites, choices, macs = problem.sites, problem.choices, problem.shape.macs
    how = effort(macs, len(sites))
    held_out = _some(source.split("validation"), how.images)
    fit = source.split("calibration").spread(_fitted(macs))
    refit = problem.method.section.refit
    measured = measure(teacher, sites, choices, how, fit, held_out, refit=refit, progress=progress)
    return interpolate(measured, sites, choices, SHARES[0])


def reduce_closed_form(
    problem: Problem,
    teacher: Teacher,
    module: nn.Module,
    widths: Mapping[Key, int],
    source: DataSource,
    progress: Progress = SILENT,
    dampings: Mapping[str, float] | None = None,
) -> tuple[dict[Key, tuple[int, ...]], ClosedForm]:
    """(kept positions, what was chosen and why) after reducing `module` to some widths in place.

    β, and whether the last linear is re-fitted too, are chosen by the divergence from the dense model on validation images,
    labels unread; a model too large to try all β takes the first. Dampings that are given, by linear, are not chosen.
    """
    section, macs, sites = problem.method.section, problem.shape.macs, problem.sites_of(widths)
    calibration = source.split("calibration")
    validation = _some(source.split("validation"), _judged(macs))
    betas = betas_for(problem, len(calibration))
    reference, start = outputs_of(teacher.module, validation), copy.deepcopy(module)
    best: tuple[float, nn.Module, Head | None, Reduced, float] | None = None
    tried: dict[str, float | None] = {}
    for index, beta in enumerate(betas):
        work, how = copy.deepcopy(start), Pass(beta, section.refit, section.sequential, dampings or {})
        part = progress.step(index, len(betas)).part(0.0, PASS_SHARE)
        reduced = reduce_sequentially(teacher, work, sites, widths, calibration, how, part)
        for head, outputs in _outputs(work, reduced.head, validation):
            apart = float(divergence_by_image(teacher.likelihood, outputs, reference).mean())
            tried[f"{beta}{'' if head is None else ' head'}"] = apart if math.isfinite(apart) else None
            apart = apart if math.isfinite(apart) else math.inf
            if best is None or apart < best[0]:
                best = apart, work, head, reduced, beta
    assert best is not None
    progress.at(1.0, "reduced")
    _, chosen, head, reduced, beta = best
    if head is not None:
        head.put_into(chosen)
    restore_scales(chosen, teacher.module, teacher.family.branches(teacher.module))
    for name, child in chosen.named_children():
        setattr(module, name, child)
    return reduced.kept, ClosedForm(beta, head is not None, tried, reduced.dampings)


@torch.no_grad()
def _outputs(
    module: nn.Module, head: Head | None, images: Dataset[tuple[Tensor, int]]
) -> list[tuple[Head | None, Outputs]]:
    """(None, outputs as they are), and those that another classifier would give, from one pass."""
    if head is None:
        return [(None, outputs_of(module, images))]
    plain, other = [], []
    with captured(module, {head.name: "in"}) as seen:
        for batch, _ in batches(images, 64):
            plain.append(module(batch))
            other.append(functional.linear(seen[head.name], head.weight, head.bias))
    return [(None, torch.cat(plain)), (head, torch.cat(other))]
