"""What each width costs: measured on the otherwise dense model, from a cached prefix.

For each block and site a ladder of widths is tried. The damage of a candidate is the KL divergence of the stitched
model's output from the dense one's, by the likelihood of these outputs, on held-out images. Where that is too dear for every width, it is measured at
some, and in between it follows the squared error of the branch itself, which is cheap: near the dense model the divergence is
quadratic in the error, so that the ratio of the two changes slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.compress.allocate import Choices
from toolchain.compress.branches import first_residual, fold_scales, run_branch
from toolchain.compress.reductions import REDUCTIONS, Reduction, sites_in
from toolchain.compress.sensitivity import Sensitivity
from toolchain.compress.solver import Candidate, Site, key_of, ladder
from toolchain.families import Branch, Family
from toolchain.likelihood import Likelihood
from toolchain.surgery.factorised import replace_module

WORST = 1e6
"""What stands for the damage of a width that leaves no finite output, in nats."""


def divergence(likelihood: Likelihood, outputs: Tensor, reference: Tensor) -> float:
    """The mean over images of the divergence of outputs from those of the dense model, both [B, K], in float64."""
    return float(likelihood.divergence(outputs.double(), reference.double()).mean())


@torch.no_grad()
def measure(
    dense: nn.Module,
    family: Family,
    sites: Sequence[Site],
    choices: Choices,
    shares: Sequence[float],
    anchors: int,
    calibration: Dataset[tuple[Tensor, int]],
    held_out: Dataset[tuple[Tensor, int]],
    cares: Mapping[str, Sensitivity],
    likelihood: Likelihood,
    refit: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> list[Candidate]:
    """The damage of every candidate of every site.

    Args:
        dense: the model; left as it is.
        family: its declaration.
        sites: what may shrink.
        choices: the multiples and the floor of their widths.
        shares: the widths to try, as shares of a site.
        anchors: at how many of these widths the divergence itself is measured.
        calibration: images that statistics are taken from.
        held_out: images that damage is measured on.
        cares: branch module → what the output cares about.
        likelihood: of the outputs, by which they are compared.
        refit: whether what is left of a site takes over.
        progress: receives (share done, text).
    """
    blocks = family.branches(dense)
    flat = [branch for branches in blocks.values() for branch in branches]
    plain = copy.deepcopy(dense)
    fold_scales(plain, flat)
    work = copy.deepcopy(plain)
    fit, probe = (first_residual(dense, next(iter(blocks)), images) for images in (calibration, held_out))
    reference = finish(dense, family, probe, flat)
    found: list[Candidate] = []
    for index, branch in enumerate(flat):
        care, wanted = cares[branch.module], [run_branch(dense, branch, x) for x in probe]
        for site in sites_in(branch, sites):
            reduction = REDUCTIONS[key_of(site)[1]](work, branch, site, fit, care)
            tried = _Tried(work, dense, family, branch, flat[index + 1 :], reduction, care, likelihood, refit)
            found += tried.candidates(site, ladder(site, choices, shares), anchors, probe, wanted, reference)
            replace_module(work, branch.module, copy.deepcopy(plain.get_submodule(branch.module)))
        fit = [x + run_branch(dense, branch, x) for x in fit]
        probe = [x + y for x, y in zip(probe, wanted, strict=True)]
        if progress is not None:
            progress((index + 1) / len(flat), f"damage of {branch.module}")
    return found


class _Tried:
    """One site of an otherwise dense model, cut to some widths."""

    def __init__(
        self,
        work: nn.Module,
        dense: nn.Module,
        family: Family,
        branch: Branch,
        rest: Sequence[Branch],
        reduction: Reduction,
        care: Sensitivity,
        likelihood: Likelihood,
        refit: bool,
    ) -> None:
        self.work, self.dense, self.family, self.branch, self.rest = work, dense, family, branch, rest
        self.reduction, self.care, self.likelihood, self.refit = reduction, care, likelihood, refit

    def candidates(
        self,
        site: Site,
        rungs: Sequence[int],
        anchors: int,
        probe: Sequence[Tensor],
        wanted: Sequence[Tensor],
        reference: Tensor,
    ) -> list[Candidate]:
        """All rungs, ascending; the widest is the dense site and costs nothing."""
        cuts = list(rungs[:-1])
        chosen = np.unique(np.linspace(0, len(cuts) - 1, anchors + 2).round().astype(int)[1:-1]) if cuts else ()
        measured = set(range(len(cuts))) if anchors >= len(cuts) else {int(i) for i in chosen}
        errors, divergences = [], {}
        for index, width in enumerate(cuts):
            self.reduction.apply(width, refit=self.refit)
            outputs = [run_branch(self.work, self.branch, x) for x in probe]
            errors.append(sum(self.care.error(y - w) for y, w in zip(outputs, wanted, strict=True)))
            if index in measured:
                after = [x + y for x, y in zip(probe, outputs, strict=True)]
                outputs_after = finish(self.dense, self.family, after, self.rest)
                found = divergence(self.likelihood, outputs_after, reference)
                divergences[index] = max(0.0, found) if np.isfinite(found) else WORST
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
def finish(model: nn.Module, family: Family, batches: Sequence[Tensor], branches: Sequence[Branch]) -> Tensor:
    """Outputs [B, K] of all batches, from the residual stream before the first of the remaining branches."""
    logits = []
    for batch in batches:
        x = batch
        for branch in branches:
            x = x + run_branch(model, branch, x)
        logits.append(family.head(model, x))
    return torch.cat(logits)
