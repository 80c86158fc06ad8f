"""From paired samples to a confidence interval: block log ratios and a bootstrap of their median.

Pure functions on arrays. A block times every variant within a fraction of a second, so what slows the machine down
slows all of them, and cancels in the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 10_000
AUTOCORRELATED = 0.3
HIERARCHICAL = 5
"""From this many sessions on they are resampled too, so that their disagreement widens the interval."""
P90_SAMPLES, P99_SAMPLES = 500, 5_000
"""The fewest samples that a tail is quoted from."""


@dataclass(frozen=True)
class Interval:
    """A log ratio of times, log(B/A), with its confidence bounds: below 0, B is faster."""

    point: float
    lo: float
    hi: float

    @property
    def half_width(self) -> float:
        """Half the distance between the bounds."""
        return (self.hi - self.lo) / 2

    def to_ratio(self) -> dict[str, float]:
        """`point`, `lo`, `hi` as ratios of times, e^x."""
        return {"point": math.exp(self.point), "lo": math.exp(self.lo), "hi": math.exp(self.hi)}


def slot_medians(slots: Sequence[Sequence[int]]) -> Floats:
    """The median of each slot's samples, in the samples' unit [blocks]."""
    return np.array([np.median(samples) for samples in slots])


def block_log_ratios(numerator: Sequence[Sequence[int]], denominator: Sequence[Sequence[int]]) -> Floats:
    """ln(median of the numerator's slot / median of the denominator's slot) for each block [blocks]."""
    return np.log(slot_medians(numerator) / slot_medians(denominator))


def tail(samples: Sequence[int], share: float) -> float | None:
    """The quantile `share` (0.9 or more) of single calls; None where there are too few to know it."""
    needed = P90_SAMPLES if share <= 0.9 else P99_SAMPLES
    return float(np.quantile(samples, share)) if len(samples) >= needed else None


def lag1_autocorrelation(sessions: Sequence[Floats]) -> float:
    """The correlation of consecutive blocks, pooled over sessions, each around its own mean; 0 for constant data.

    Corrected to first order for the bias of short series, (1 + 3ρ)/n (Kendall 1954).
    """
    centred = [session - session.mean() for session in sessions]
    variance = sum(float(x @ x) for x in centred)
    if variance == 0:
        return 0.0
    rho = sum(float(x[:-1] @ x[1:]) for x in centred) / variance
    return rho + (1 + 3 * rho) / min(len(session) for session in sessions)


def stretch(sessions: Sequence[Floats]) -> float:
    """What the deviations of a bootstrap are multiplied by.

    √(S/(S−1)) where S sessions are resampled too: a spread of few is estimated too small by that. Else, where blocks
    are autocorrelated, √((1+ρ)/(1−ρ)): by that the mean of an AR(1) process of lag-1 autocorrelation ρ is less certain.
    """
    if len(sessions) >= HIERARCHICAL:
        return math.sqrt(len(sessions) / (len(sessions) - 1))
    rho = min(lag1_autocorrelation(sessions), 0.95)
    return math.sqrt((1 + rho) / (1 - rho)) if rho > AUTOCORRELATED else 1.0


def bootstrap_medians(sessions: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """The median over all blocks in each bootstrap resample [resamples], stretched about that of the data.

    Fewer than `HIERARCHICAL` sessions are each resampled from themselves (stratified), so that every resample holds
    all of them; of more, sessions are drawn first and then blocks within them. Simulated with 20 blocks a session,
    nominal 95 % intervals held the truth in 92–94 % (stratified, ρ ≤ 0.7), and in 90–100 % with sessions that
    disagree by up to a block's own spread (hierarchical); a test repeats a part of that.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([len(session) for session in sessions])
    padded = np.array([np.pad(session, (0, sizes.max() - len(session))) for session in sessions])
    shape = (resamples, len(sessions))
    picked = (
        rng.integers(0, len(sessions), shape)
        if len(sessions) >= HIERARCHICAL
        else np.tile(np.arange(len(sessions)), (resamples, 1))
    )
    lengths = sizes[picked][:, :, None]  # [resamples, sessions, 1]
    places = (rng.random((*shape, sizes.max())) * lengths).astype(np.intp)
    drawn = np.where(np.arange(sizes.max()) < lengths, padded[picked[:, :, None], places], np.inf)
    ordered = np.sort(drawn.reshape(resamples, -1), axis=1)
    counts = lengths.sum(axis=(1, 2))  # how many of a row are blocks; the rest lie behind them
    rows = np.arange(resamples)
    medians = (ordered[rows, (counts - 1) // 2] + ordered[rows, counts // 2]) / 2
    point = float(np.median(np.concatenate(sessions)))
    found: Floats = point + stretch(sessions) * (medians - point)
    return found


def median_interval(
    sessions: Sequence[Floats], *, alpha: float = 0.05, looks: int = 1, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The median of all blocks with its 1 - alpha/looks bootstrap interval.

    Args:
        sessions: one array of block log ratios per session.
        alpha: probability of missing the truth, over all looks.
        looks: how often the data may be looked at while it grows; each look is paid for (Bonferroni).
        resamples: bootstrap resamples.
        seed: of the resampling; equal data and seed give equal bounds.
    """
    outside = alpha / looks / 2
    lo, hi = np.quantile(bootstrap_medians(sessions, resamples=resamples, seed=seed), [outside, 1 - outside])
    return Interval(float(np.median(np.concatenate(sessions))), float(lo), float(hi))
