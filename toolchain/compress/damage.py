"""Measures the damage of each width of each site, with the rest of the model dense and its prefix cached.

For each block and site a ladder of widths is tried. The damage of a candidate is the KL divergence of the stitched
model's output from the dense one's, by the likelihood of these outputs, on held-out images. Where that is too dear for every width, it is measured at
some, and in between it follows the squared error of the branch itself, which is cheap: near the dense model the divergence is
quadratic in the error, so that the ratio of the two changes slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.compress.branches import first_residual
from toolchain.compress.choices import Choices, Site, key_of
from toolchain.compress.reductions import REDUCTIONS, Reduction, sites_in
from toolchain.compress.sensitivity import Teacher
from toolchain.compress.solver import Candidate, ladder
from toolchain.errors import ModelError
from toolchain.families import Branch, Step
from toolchain.foreign import first_line
from toolchain.likelihood import divergence_by_image, outputs_of, parts_of
from toolchain.progress import SILENT, Progress
from toolchain.surgery.factorised import replace_module
from toolchain.surgery.scales import fold_scales

WAY_ROUNDING = 1e-3
"""Largest allowed difference between two ways to the same outputs, in units of the largest."""
WORST = 1e6
"""Damage in nats that is assumed for a width whose output is not finite."""


@dataclass(frozen=True)
class Tap:
    """A step of the stream, and the function that makes the model's next output of the stream after it; None for no output."""

    step: Step
    read: Step | None

    def outputs(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """The outputs that are read of the stream after this step."""
        return [] if self.read is None else [self.read(model, x)]


def way_through(teacher: Teacher) -> list[Tap]:
    """Every step of the stream from before the first block on, each with the output that is read after it."""
    reads = teacher.family.readings(teacher.module)
    return [
        Tap(step, reads.get(block.path) if last else None)
        for block in teacher.family.blocks(teacher.module)
        for step, last in zip(block.steps, (*([False] * (len(block.steps) - 1)), True), strict=True)
    ]


def require_way(teacher: Teacher, name: str, images: Dataset[tuple[Tensor, int]]) -> None:
    """Nothing, if blocks and head one after another give what the model itself gives for a few images.

    Everything is learned from the blocks alone: what a model did between them would be overlooked.

    Raises:
        ModelError: they give something else; `name` is the model in the message.
    """
    dense, first = teacher.module, teacher.family.blocks(teacher.module)[0].path
    expected = parts_of(outputs_of(dense, images))
    if fault := difference(
        expected, lambda: finish(teacher, first_residual(dense, first, images), way_through(teacher))
    ):
        raise ModelError(
            f"{name} does more than its blocks say: computed by them alone its outputs {fault}. Compression would be "
            f"wrong. A subclass of timm's {type(dense).__name__} with steps of its own needs a family of its own "
            "(CONTRIBUTING.md); if this is timm's own model, please report it, with its name and the size of the images"
        )


def difference(expected: Sequence[Tensor], compute: Callable[[], Sequence[Tensor]]) -> str:
    """How outputs differ from those that are expected, to follow "outputs"; "" where they do not, up to rounding."""
    try:
        pairs = zip(expected, compute(), strict=True)
        largest = max(float((y - z).abs().max() / y.abs().max().clamp_min(1e-12)) for y, z in pairs)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        return f"cannot be computed so ({first_line(error)})"
    return f"differ by {largest:.1e} of the largest" if largest > WAY_ROUNDING else ""


@dataclass(frozen=True)
class Effort:
    """How closely damage is measured.

    Attributes:
        shares: the widths to try, as shares of a site.
        anchors: at how many of these widths the divergence itself is measured.
        images: on how many held-out images, before that is rounded.
    """

    shares: tuple[float, ...]
    anchors: int
    images: float


@torch.no_grad()
def measure(
    teacher: Teacher,
    sites: Sequence[Site],
    choices: Choices,
    effort: Effort,
    calibration: Dataset[tuple[Tensor, int]],
    held_out: Dataset[tuple[Tensor, int]],
    *,
    refit: bool = True,
    progress: Progress = SILENT,
) -> list[Candidate]:
    """The damage of every candidate of every site.

    Args:
        teacher: the dense model.
        sites: what may shrink.
        choices: the multiples and the floor of their widths.
        effort: which widths, and how closely.
        calibration: images that statistics are taken from.
        held_out: images that damage is measured on.
        refit: whether what is left of a site takes over.
        progress: told about every branch.
    """
    dense, blocks = teacher.module, teacher.family.blocks(teacher.module)
    way = way_through(teacher)
    plain = copy.deepcopy(dense)
    fold_scales(plain, teacher.family.branches(dense))
    work = copy.deepcopy(plain)
    fit, probe = (first_residual(dense, blocks[0].path, images) for images in (calibration, held_out))
    reference = finish(teacher, probe, way)
    candidates: list[Candidate] = []
    for index, step in enumerate(place.step for place in way):
        if not isinstance(step, Branch):
            fit, probe = ([step(dense, x) for x in stream] for stream in (fit, probe))
            continue
        wanted = [step.gives(dense, x) for x in probe]
        for site in sites_in(step, sites):
            reduction = REDUCTIONS[key_of(site)[1]](work, step, site, fit, teacher.cares[step.module])
            tried = _Tried(work, teacher, step, way, index + 1, reduction, refit)
            rungs = ladder(site, choices, effort.shares)
            candidates += tried.candidates(site, rungs, effort.anchors, probe, wanted, reference)
            replace_module(work, step.module, copy.deepcopy(plain.get_submodule(step.module)))
        fit = [step(dense, x) for x in fit]
        probe = [step.after(x, step.adds(dense, y)) for x, y in zip(probe, wanted, strict=True)]
        progress.at((index + 1) / len(way), f"damage of {step.module}")
    return candidates


@dataclass(frozen=True)
class _Tried:
    """One site of an otherwise dense model, cut to some widths; its branch is the last of `done` steps of the way."""

    work: nn.Module
    teacher: Teacher
    branch: Branch
    way: Sequence[Tap]
    done: int
    reduction: Reduction
    refit: bool

    def candidates(
        self,
        site: Site,
        rungs: Sequence[int],
        anchors: int,
        probe: Sequence[Tensor],
        wanted: Sequence[Tensor],
        reference: tuple[Tensor, ...],
    ) -> list[Candidate]:
        """All rungs, ascending; the widest is the dense site and costs nothing."""
        cuts, care = list(rungs[:-1]), self.teacher.cares[self.branch.module]
        chosen = np.unique(np.linspace(0, len(cuts) - 1, anchors + 2).round().astype(int)[1:-1]) if cuts else ()
        measured = set(range(len(cuts))) if anchors >= len(cuts) else {int(i) for i in chosen}
        errors, divergences = [], {}
        for index, width in enumerate(cuts):
            self.reduction.apply(width, refit=self.refit)
            gives = [self.branch.gives(self.work, x) for x in probe]
            errors.append(sum(care.error(y - w) for y, w in zip(gives, wanted, strict=True)))
            if index in measured:
                branch, work = self.branch, self.work
                after = [branch.after(x, branch.adds(work, y)) for x, y in zip(probe, gives, strict=True)]
                later = finish(self.teacher, after, self.way, self.done)
                whole = (*reference[: len(reference) - len(later)], *later)  # what was read before is the dense one's
                outputs = (self.teacher.family.outputs(parts) for parts in (whole, reference))
                apart = float(divergence_by_image(self.teacher.likelihood, *outputs).mean())
                divergences[index] = max(0.0, apart) if np.isfinite(apart) else WORST
        damage = follow(errors, divergences)
        return [Candidate(key_of(site), width, d) for width, d in zip(rungs, [*damage, 0.0], strict=True)]


def follow(errors: Sequence[float], divergences: dict[int, float]) -> list[float]:
    """Divergence at every index: measured where it is known, elsewhere error × the ratio of the two, log-interpolated.

    Args:
        errors: squared error of the branch at each width.
        divergences: index → measured divergence.
    """
    known = [i for i in sorted(divergences) if 0 < divergences[i] < WORST and 0 < errors[i] < np.inf]
    ratios = [np.log(divergences[i] / errors[i]) for i in known]
    scale = np.exp(np.interp(np.arange(len(errors)), known, ratios)) if known else np.zeros(len(errors))
    followed = [error * ratio if np.isfinite(error) else WORST for error, ratio in zip(errors, scale, strict=True)]
    return [divergences.get(i, float(value)) for i, value in enumerate(followed)]


@torch.no_grad()
def finish(teacher: Teacher, batches: Sequence[Tensor], way: Sequence[Tap], done: int = 0) -> tuple[Tensor, ...]:
    """The outputs of all batches that are read from the residual stream after `done` steps of the way, or later."""
    outputs = []
    for batch in batches:
        x, parts = batch, way[done - 1].outputs(teacher.module, batch) if done else []
        for place in way[done:]:
            x = place.step(teacher.module, x)
            parts += place.outputs(teacher.module, x)
        outputs.append(parts)
    return tuple(torch.cat(part) for part in zip(*outputs, strict=True))
