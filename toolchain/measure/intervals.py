"""From paired samples to a confidence interval: block log ratios and a bootstrap of their median.

Pure functions on arrays. A block times every variant within a fraction of a second, so what slows the machine down
slows all of them, and cancels in the ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
RESAMPLES = 10_000
MANY_SESSIONS = 5
"""From this many on, their disagreement is known well enough for the interval alone to speak of it."""
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


def outward(lo: float, hi: float, digits: int = 2) -> str:
    """The bounds as `[lo, hi]`, each rounded away from the other: what is printed holds what was found."""
    unit = 10**digits
    return f"[{math.floor(lo * unit) / unit:.{digits}f}, {math.ceil(hi * unit) / unit:.{digits}f}]"


def slot_medians(slots: Sequence[Sequence[int]]) -> Floats:
    """The median of each slot's samples, in the samples' unit [blocks]; numpy's is many times slower where they are few."""
    return np.array([statistics.median(samples) for samples in slots], dtype=float)


def block_log_ratios(numerator: Sequence[Sequence[int]], denominator: Sequence[Sequence[int]]) -> Floats:
    """ln(median of the numerator's slot / median of the denominator's slot) for each block [blocks]."""
    return np.log(slot_medians(numerator) / slot_medians(denominator))


def tail(samples: Sequence[int], share: float) -> float | None:
    """The quantile `share` (0.9 or more) of single calls; None where there are too few to know it."""
    needed = P90_SAMPLES if share <= 0.9 else P99_SAMPLES
    return float(np.quantile(samples, share)) if len(samples) >= needed else None


def session_error(sessions: Sequence[Floats]) -> float:
    """The standard error of the estimate as the sessions' own medians show it, weighted by their blocks.

    √(Σwᵢ² · Σwᵢ(mᵢ−m̄)²/(1−Σwᵢ²)), w the share of blocks; s/√S where all have as many. 0 for one session.
    """
    weights = np.array([len(session) for session in sessions], dtype=float)
    weights /= weights.sum()
    medians = np.array([np.median(session) for session in sessions])
    squares = float(weights @ weights)
    if squares >= 1:
        return 0.0
    spread = float(weights @ (medians - weights @ medians) ** 2) / (1 - squares)
    return math.sqrt(squares * spread)


def too_few(medians: Sequence[float], tau: float) -> bool:
    """Whether sessions are too few to speak for what was timed: one alone, or some that lie more than tau/2 apart.

    From `MANY_SESSIONS` on their disagreement is in the interval.

    Args:
        medians: of each session, logarithms.
        tau: tolerance of the verdict.
    """
    return len(medians) == 1 or (len(medians) < MANY_SESSIONS and max(medians) - min(medians) > tau / 2)


def bootstrap_medians(sessions: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """The median over all blocks in each bootstrap resample [resamples], widened by what sessions disagree.

    Blocks are drawn within their session (stratified), so that every resample holds all sessions in full. What a
    process keeps for its whole life (where its memory lies, which kernels it chose), and what neighbouring blocks share,
    shows only between sessions: so at every quantile the deviation is at least that of a t distribution with S − 1
    degrees of freedom, scaled by `session_error`. One session alone says nothing of that.
    """
    rng = np.random.default_rng(seed)
    drawn = [session[rng.integers(0, len(session), (resamples, len(session)))] for session in sessions]
    point = float(np.median(np.concatenate(sessions)))
    blocks = row_medians(np.concatenate(drawn, axis=1)) - point
    if len(sessions) == 1:
        return point + blocks
    order = blocks.argsort(kind="stable")
    between = session_error(sessions) * _student(len(sessions) - 1, resamples)
    wider = np.where(np.abs(between) > np.abs(blocks[order]), between, blocks[order])
    found = np.empty_like(blocks)
    found[order] = point + np.sort(wider)  # in the order of the draws: other comparisons are averaged with them
    return found


def row_medians(rows: Floats) -> Floats:
    """The median of each row, to the bit that of `numpy.median`, which is many times slower where rows are short."""
    ordered, count = np.sort(rows, axis=1), rows.shape[1]
    middle: Floats = (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2
    return middle


@lru_cache(maxsize=64)
def _student(freedom: int, count: int) -> Floats:
    """`count` quantiles of Student's t, evenly spaced in probability, ascending."""
    found: Floats = stdtrit(freedom, (np.arange(count) + 0.5) / count)
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
    drawn = bootstrap_medians(sessions, resamples=resamples, seed=seed)
    return percentile_interval(sessions, drawn, alpha=alpha / looks)


def order_interval(values: Sequence[float], alpha: float) -> Interval:
    """The median of values that are drawn alike, with an interval that holds theirs with probability 1 - alpha at least.

    The bounds are the k-th smallest and the k-th largest, with the largest k that 2·P(Binomial(n, ½) < k) ≤ alpha allows; nothing
    is assumed of how the values are distributed.

    Raises:
        ValueError: they are too few for this alpha: even the smallest and the largest are too close.
    """
    ordered, below, probability = sorted(values), 0, 0.0
    while (probability := probability + math.comb(len(ordered), below) / 2 ** len(ordered)) * 2 <= alpha:
        below += 1
    if not below:
        raise ValueError(f"{len(ordered)} values have no interval at alpha {alpha:g}; measure more")
    return Interval(float(np.median(ordered)), ordered[below - 1], ordered[-below])


def percentile_interval(sessions: Sequence[Floats], drawn: Floats, *, alpha: float) -> Interval:
    """The median of all blocks with its 1 - alpha interval from what `bootstrap_medians` drew of them [resamples]."""
    lo, hi = np.quantile(drawn, [alpha / 2, 1 - alpha / 2])
    return Interval(float(np.median(np.concatenate(sessions))), float(lo), float(hi))
