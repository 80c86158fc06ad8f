"""Ridge re-fit of a linear, with the damping that errs least on held-out scenes.

A last linear has hundreds of columns. The tokens of a picture resemble each other, and where the output reads a class token
alone, each picture is one row that counts: how well a fit is known depends on the number of scenes, not of rows.

Legend: N images, n rows, p columns of a linear, q outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from toolchain.compress.moments import Joined, Moments, joined
from toolchain.compress.obs import anchored_refit
from toolchain.data import Images

FOLDS = 4
DAMPINGS = (1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Dampings that are tried, as shares of the mean variance of a column."""
UNTRIED = 0.03
"""Damping that is used if all images show one scene, so that none can be held out."""


def folds_of(images: Dataset[tuple[Tensor, int]]) -> Tensor:
    """The fold of each image, int64 [N]: a scene lies in one, and folds hold about as many images each."""
    count = len(images)  # type: ignore[arg-type]  # torch: no __len__
    scenes = images.scenes if isinstance(images, Images) else torch.arange(count)
    _, numbers, sizes = torch.unique(scenes, return_inverse=True, return_counts=True)
    held, fold_of_scene = [0] * min(FOLDS, len(sizes)), torch.zeros_like(sizes)
    for scene in sizes.argsort(descending=True, stable=True).tolist():
        fold = held.index(min(held))
        held[fold] += int(sizes[scene])
        fold_of_scene[scene] = fold
    return fold_of_scene[numbers]


class Ridge:
    """A re-fit of a linear towards what is asked of it, from rows that come batch by batch, apart for each fold."""

    def __init__(self, *, centred: bool = True) -> None:
        self._parts = [Moments(centred=centred) for _ in range(FOLDS)]

    def add(self, x: Tensor, error: Tensor, folds: Tensor, weights: Tensor | None = None) -> None:
        """Adds what enters the linear for some images, [B, n, p], and what its output lacks, [B, n, q].

        Args:
            x, error: of B images, n rows each.
            folds: of each image, int64 [B].
            weights: how often each row counts, [B, n]; once if absent.
        """
        for fold in torch.unique(folds).tolist():
            mine = folds == fold
            counts = None if weights is None else weights[mine].flatten()
            self._parts[fold].add(x[mine].flatten(0, 1), error[mine].flatten(0, 1), counts)

    def fitted(self, weight: Tensor, bias: Tensor | None, damping: float | None = None) -> tuple[Tensor, Tensor, float]:
        """(W' [q, p], b' [q], the damping), as `anchored_refit` with a damping, or that which errs least on held-out folds.

        The sums are used up.
        """
        parts = [joined([part]) for part in self._parts if part.weight]
        self._parts.clear()
        if damping is None:
            damping = UNTRIED if len(parts) < 2 else least_damping(parts)
        return *anchored_refit(weight, bias, joined(parts), damping), damping


def least_damping(parts: Sequence[Joined]) -> float:
    """The damping whose re-fits on all folds but one leave the least squared error on that one, summed over folds.

    If moments are not finite, as after an overflow, `UNTRIED` is used.
    """
    if not all(bool(part.covariance.isfinite().all() and part.cross.isfinite().all()) for part in parts):
        return UNTRIED
    errors = torch.zeros(len(DAMPINGS), dtype=torch.float64)
    for held in parts:
        errors += held.weight * _held_out(joined([part for part in parts if part is not held]), held)
    return DAMPINGS[int(errors.argmin())]


def _held_out(fit: Joined, held: Joined) -> Tensor:
    """The mean squared error on `held` after a re-fit on `fit`, less what it is without one, for each damping.

    The change of the weights is D = F V (Λ + λ)^{-1} Vᵀ, with F = E[(e − ē) x̃ᵀ] and V Λ Vᵀ = E[x̃ x̃ᵀ] of `fit`. With x̂ and ê
    the rows of `held` about the means of `fit`, the error is E‖ê − D x̂‖² − E‖ê‖²: a quadratic form in (Λ + λ)^{-1}, the same
    for each λ.
    """
    values, vectors = torch.linalg.eigh(fit.covariance)
    away, off = held.mean - fit.mean, held.other_mean - fit.other_mean
    towards = fit.cross @ vectors
    linear = (towards * ((held.cross + torch.outer(off, away)) @ vectors)).sum(0)
    square = vectors.T @ (held.covariance + torch.outer(away, away)) @ vectors
    square *= towards.T @ towards
    level = float(fit.covariance.diagonal().mean())
    shrunk = torch.stack([1 / (values.clamp_min(0) + (damping * level or 1e-12)) for damping in DAMPINGS])
    errors: Tensor = ((shrunk @ square) * shrunk).sum(1) - 2 * shrunk @ linear
    return errors
