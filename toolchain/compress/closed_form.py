"""The label-free method end to end: what each width costs, then the sequential pass at the best β."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.compress.allocate import Choices, Key
from toolchain.compress.branches import captured
from toolchain.compress.damage import divergence, measure
from toolchain.compress.sensitivity import Sensitivity, flat, sensitivities
from toolchain.compress.sequential import Head, reduce_sequentially
from toolchain.compress.solver import Candidate, Site
from toolchain.cost import ModelShape
from toolchain.data import DataSource, Images, batches
from toolchain.likelihood import Likelihood, likelihood_of, outputs_of
from toolchain.model import TimmModel
from toolchain.recipe import CompressSection

BETAS = (0.5, 0.0, 1.0)
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
PASSES = 6
"""What one sequential pass costs, in forward passes of the dense model."""
Told = Callable[[float, str], None]


def _some(images: Images, count: float) -> Images:
    least, most = IMAGES
    return _spread(images, int(min(max(count, least), most)))


def _spread(images: Images, count: int) -> Images:
    """`count` images at even steps, or all: folders, and so splits, are often in the order of their classes."""
    count = min(count, len(images))
    return images.take(torch.arange(count) * len(images) // max(count, 1))


def effort(macs: int, sites: int) -> tuple[tuple[float, ...], int, float]:
    """(the ladder, at how many of its widths the divergence itself is measured, on how many images) for a model.

    Fewer images come first, then fewer widths, then a coarser ladder.
    """
    for shares in SHARES:
        for anchors in (len(shares), 3, 1):
            count = MEASURE_MACS / (macs * _passes(len(shares), anchors, sites))
            if count >= 0.9 * IMAGES[0]:
                return shares, anchors, count
    return SHARES[-1], 1, IMAGES[0]


def _passes(shares: int, anchors: int, sites: int) -> float:
    """Forward passes for each probe image: a divergence runs half of the model on average, a branch alone its share."""
    return 2 + shares + 0.5 * anchors * sites


def betas_for(section: CompressSection, macs: int, images: int) -> tuple[float, ...]:
    """The β to try: all, if that is affordable; one where there is nothing that β could correct."""
    if not (section.refit and section.sequential):
        return (0.0,)
    return BETAS if len(BETAS) * PASSES * images * macs <= MEASURE_MACS else BETAS[:1]


def damage_share(section: CompressSection, macs: int, sites: int, images: int) -> float:
    """The share of the closed form's work that goes into measuring damage, in forward passes; for progress alone."""
    if section.allocation != "solver" or not sites:
        return 0.0
    shares, anchors, count = effort(macs, sites)
    damage = 2 * images + min(count, IMAGES[1]) * _passes(len(shares), anchors, sites)
    return damage / (damage + len(betas_for(section, macs, images)) * PASSES * images)


def likelihood_for(given: TimmModel, source: DataSource) -> Likelihood:
    """The likelihood of a dense model's outputs, as calibration images show them; raises DataError if they never vary."""
    return likelihood_of(given.output, given.module, source.split("calibration"))


def what_matters(
    given: TimmModel, dense: ModelShape, source: DataSource, section: CompressSection, likelihood: Likelihood
) -> Mapping[str, Sensitivity]:
    """Branch module → its sensitivity, from calibration images; flat where the recipe turns it off, or without images."""
    if not section.sensitivity or source.synthetic:
        tokens = next(iter(dense.attentions.values())).tokens
        return flat(given.module, given.family, tokens)
    images = _some(source.split("calibration"), SENSITIVITY_MACS / (3 * dense.macs))
    return sensitivities(given.module, given.family, images, section.seed, likelihood)


def candidates_for(
    given: TimmModel,
    sites: Sequence[Site],
    choices: Choices,
    dense: ModelShape,
    source: DataSource,
    section: CompressSection,
    cares: Mapping[str, Sensitivity],
    likelihood: Likelihood,
    told: Told,
) -> list[Candidate]:
    """Every site at a ladder of widths, and what each costs on held-out images."""
    shares, anchors, count = effort(dense.macs, len(sites))
    held_out = _some(source.split("validation"), count)
    fit = source.split("calibration")
    fit = _spread(fit, max(64, int(0.5 * MEASURE_MACS / (4 * dense.macs))))
    return measure(
        given.module,
        given.family,
        sites,
        choices,
        shares,
        anchors,
        fit,
        held_out,
        cares,
        likelihood,
        section.refit,
        told,
    )


def reduce_closed_form(
    given: TimmModel,
    module: nn.Module,
    sites: Sequence[Site],
    widths: Mapping[Key, int],
    dense: ModelShape,
    source: DataSource,
    section: CompressSection,
    cares: Mapping[str, Sensitivity],
    likelihood: Likelihood,
    told: Told,
) -> tuple[dict[Key, tuple[int, ...]], dict[str, Any]]:
    """(kept positions, what was chosen and the divergences that it was chosen by) after reducing `module` in place.

    β, and whether the last linear is re-fitted too, are chosen by the divergence from the dense model on validation images,
    labels unread; a model too large to try all β takes the first.
    """
    calibration = source.split("calibration")
    validation = _some(source.split("validation"), 0.2 * MEASURE_MACS / dense.macs)
    betas = betas_for(section, dense.macs, len(calibration))
    reference, start = outputs_of(given.module, validation), copy.deepcopy(module)
    best: tuple[float, nn.Module, Head | None, dict[Key, tuple[int, ...]], float] | None = None
    tried: dict[str, float | None] = {}
    for index, beta in enumerate(betas):
        work = copy.deepcopy(start)

        def progress(share: float, text: str, index: int = index) -> None:
            told((index + share) / len(betas), f"reducing {text}")

        reduced = reduce_sequentially(
            given.module,
            work,
            given.family,
            sites,
            widths,
            calibration,
            cares,
            likelihood,
            beta=beta,
            refit=section.refit,
            sequential=section.sequential,
            progress=progress,
        )
        for head, outputs in _outputs(work, reduced.head, validation):
            found = divergence(likelihood, outputs, reference)
            tried[f"{beta}{'' if head is None else ' head'}"] = found if math.isfinite(found) else None
            found = found if math.isfinite(found) else math.inf
            if best is None or found < best[0]:
                best = found, work, head, reduced.kept, beta
    assert best is not None
    _, chosen, head, kept, beta = best
    if head is not None:
        head.put_into(chosen)
    for name, child in chosen.named_children():
        setattr(module, name, child)
    return kept, {"beta": beta, "head_refitted": head is not None, "kl": tried}


@torch.no_grad()
def _outputs(
    module: nn.Module, head: Head | None, images: Dataset[tuple[Tensor, int]]
) -> list[tuple[Head | None, Tensor]]:
    """(None, logits as they are), and those that another classifier would give, from one pass."""
    if head is None:
        return [(None, outputs_of(module, images))]
    plain, other = [], []
    with captured(module, {head.name: "in"}) as seen:
        for batch, _ in batches(images, 64):
            plain.append(module(batch))
            other.append(functional.linear(seen[head.name], head.weight, head.bias))
    return [(None, torch.cat(plain)), (head, torch.cat(other))]
