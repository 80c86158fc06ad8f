"""Many comparisons together: p-values agree with intervals, Holm with the closure it stands for, the mean with its parts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from toolchain.measure.intervals import median_interval
from toolchain.measure.multiplicity import geometric_mean, holm, p_value_above


def sessions(centre, seed, noise=0.02, blocks=20):
    rng = np.random.default_rng(seed)
    return [centre + noise * rng.standard_normal(blocks) for _ in range(3)]


@pytest.mark.parametrize("centre", [-0.02, 0.0, 0.003, 0.006, 0.01, 0.03])
@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_says_what_the_interval_says(centre, seed):
    data = sessions(centre, seed)
    for alpha in (0.05, 0.01):
        above = median_interval(data, alpha=alpha, seed=3).lo > 0
        p_value = p_value_above(data, 0.0, seed=3)
        assert above == (p_value <= alpha / 2) or abs(p_value - alpha / 2) < 2e-4  # a quantile lies between two draws


def test_the_p_value_falls_with_the_evidence_and_is_never_nothing():
    data = sessions(0.0, 1)
    found = [p_value_above(data, limit) for limit in (0.02, 0.003, 0.0, -0.003, -1.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.99
    assert found[-1] == pytest.approx(1 / 10_001)


def test_where_the_limit_is_the_truth_few_p_values_are_small():
    found = [p_value_above(sessions(0.0, seed), 0.0, resamples=500) for seed in range(200)]
    assert sum(p <= 0.05 for p in found) <= 20
    assert 0.35 < np.mean(found) < 0.65


def closed(p_values, alpha):
    """Holm by definition: rejected if every set of hypotheses that holds it is rejected by Bonferroni."""
    count = len(p_values)
    sets = [s for size in range(1, count + 1) for s in combinations(range(count), size)]
    return [all(min(p_values[j] for j in s) <= alpha / len(s) for s in sets if i in s) for i in range(count)]


def test_holm_is_the_closure_of_bonferroni():
    rng = np.random.default_rng(0)
    decided = set()
    for _ in range(200):
        p_values = list(rng.random(6) ** 5)
        assert holm(p_values, 0.05) == closed(p_values, 0.05)
        decided.add(sum(holm(p_values, 0.05)))
    assert len(decided) > 4, "the examples decide differently"
    assert holm([0.01, 0.012, 0.012, 0.04], 0.05) == [True, True, True, True]
    assert holm([0.013, 0.001], 0.02) == [True, True]
    assert holm([0.011, 0.011], 0.02) == [False, False]
    assert holm([], 0.05) == []


def test_the_mean_over_comparisons():
    a, b = sessions(np.log(0.5), 1), sessions(np.log(0.8), 2)
    mean = geometric_mean([a, b])
    assert np.exp(mean.point) == pytest.approx(np.sqrt(0.5 * 0.8), rel=0.01)
    assert mean.lo < mean.point < mean.hi
    single = median_interval(a)
    assert geometric_mean([a]).half_width == pytest.approx(single.half_width, rel=0.15)
    halves = np.hypot(single.half_width, median_interval(b).half_width) / 2
    assert mean.half_width == pytest.approx(halves, rel=0.25), "two independent halves"
    assert geometric_mean([a, b]) == mean


def test_the_mean_resamples_each_comparison_by_itself():
    data = sessions(0.0, 5)
    opposite = [-session for session in data]
    assert geometric_mean([data, opposite]).half_width > 0.3 * median_interval(data).half_width
