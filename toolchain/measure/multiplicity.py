"""Many comparisons judged together: one-sided p-values, Holm's procedure, and a geometric mean with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from toolchain.measure.intervals import RESAMPLES, Floats, Interval, bootstrap_medians


def p_value_above(sessions: Sequence[Floats], limit: float, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """How likely a median like that of these blocks is if the truth is at most `limit`: one-sided, by bootstrap.

    The share of bootstrap medians at or below the limit, (1 + count) / (1 + resamples), so that it is never 0. Below
    α/2 it says the same as a 1 - α percentile interval that lies above the limit.

    Args:
        sessions: one array per session, logarithms.
        limit: on the same scale.
        resamples: bootstrap resamples.
        seed: of the resampling.
    """
    medians = bootstrap_medians(sessions, resamples=resamples, seed=seed)
    return float(1 + np.count_nonzero(medians <= limit)) / (1 + len(medians))


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Which hypotheses are rejected, with a probability of at most alpha that any of them is true (Holm 1979).

    The i-th smallest of m p-values is held against alpha / (m - i + 1); the first that is too large ends it.
    """
    rejected = [False] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def geometric_mean(comparisons: Sequence[Sequence[Floats]]) -> Interval:
    """The mean over comparisons of their median log ratios, with its 95 % percentile bootstrap interval.

    Args:
        comparisons: for each, one array of block log ratios per session; each is resampled by itself.
    """
    streams = np.random.SeedSequence(0).generate_state(len(comparisons))
    means = np.mean(
        [bootstrap_medians(sessions, seed=int(stream)) for sessions, stream in zip(comparisons, streams, strict=True)],
        axis=0,
    )
    lo, hi = np.quantile(means, [0.025, 0.975])
    point = float(np.mean([np.median(np.concatenate(sessions)) for sessions in comparisons]))
    return Interval(point, float(lo), float(hi))
