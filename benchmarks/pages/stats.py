"""Relative error increase over seeds, and its paired bootstrap over test images."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Wrong = NDArray[np.bool_]
RESAMPLES = 10_000
ALPHA = 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its bootstrap interval; shares, not percent."""

    point: float
    lo: float
    hi: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.lo > 0 or self.hi < 0


def relative_increase(wrong: int, dense_wrong: int) -> float:
    """wrong/dense_wrong − 1: the errors added, as a share of the dense model's; raises ValueError if it makes none."""
    if dense_wrong <= 0:
        raise ValueError("the dense model makes no error, so there is no relative increase")
    return wrong / dense_wrong - 1


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, sample standard deviation); None for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(
    first: Wrong, second: Wrong, dense: Wrong, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """The difference of two models' relative error increases, mean over seeds, with its 95 % percentile interval.

    Statistic: mean over seeds s of (Σ first_s − Σ second_s) / Σ dense_s. With `second` = `dense` it is the relative
    error increase of `first`. Every seed sees the same test images, so an image is drawn with all its seeds: each
    resample holds every seed in full, and what makes an image hard for all of them widens the interval, as it must.
    Images with equal outcomes are exchangeable, so their counts are drawn at once from the multinomial that drawing
    images one by one would give.

    Args:
        first: bool [seeds, images], True where a model is wrong.
        second: the same of another model.
        dense: the same of the dense model; a resample in which it makes no error counts one.
        resamples: bootstrap resamples.
        seed: equal data and seed give equal bounds.
    """
    if first.shape != second.shape or first.shape != dense.shape:
        raise ValueError(f"outcomes of shapes {first.shape}, {second.shape}, {dense.shape} cannot be paired")
    if not dense.any(axis=1).all():
        raise ValueError("the dense model makes no error, so there is no relative increase")
    outcomes = np.concatenate([first, second, dense]).T  # [images, 3·seeds]
    patterns, counts = np.unique(outcomes, axis=0, return_counts=True)
    return _estimate(tuple(counts.tolist()), tuple(map(bytes, patterns)), resamples, seed)


@cache
def _estimate(counts: tuple[int, ...], patterns: tuple[bytes, ...], resamples: int, seed: int) -> Estimate:
    """The estimate from how many images have each pattern of outcomes; the tables and figures of a page ask for the same ones."""
    images = sum(counts)
    draws = np.random.default_rng(seed).multinomial(images, np.array(counts) / images, size=resamples)
    errors = np.array([[*pattern] for pattern in patterns], float)  # whole numbers: floats multiply many times as fast
    drawn, point = _statistic(draws.astype(float) @ errors), _statistic((np.array(counts, float) @ errors)[None])
    lo, hi = np.quantile(drawn, [ALPHA / 2, 1 - ALPHA / 2])
    return Estimate(float(point[0]), float(lo), float(hi))


def _statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """[resamples] of the numbers of errors [resamples, 3·seeds]."""
    first, second, dense = np.split(sums, 3, axis=1)
    shares: NDArray[np.float64] = ((first - second) / np.maximum(dense, 1)).mean(axis=1)
    return shares
