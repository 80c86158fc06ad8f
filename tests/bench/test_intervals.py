import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.bench.intervals import (
    Interval,
    block_log_ratios,
    bootstrap_medians,
    lag1_autocorrelation,
    median_interval,
    stretch,
    tail,
)

TRUTH = -0.3


def ar1(rng, size, rho, scale=0.01, burn_in=50):
    noise = rng.standard_normal(size + burn_in) * scale
    for t in range(1, len(noise)):
        noise[t] += rho * noise[t - 1]
    return noise[burn_in:]


def coverage(rho, sessions=3, disagreement=0.0, repeats=200):
    hits = 0
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        data = [TRUTH + ar1(rng, 20, rho) + disagreement * rng.standard_normal() for _ in range(sessions)]
        interval = median_interval(data, resamples=400, seed=seed)
        hits += interval.lo <= TRUTH <= interval.hi
    return hits / repeats


def test_an_interval_of_independent_blocks_holds_the_truth_as_often_as_it_says():
    assert 0.91 <= coverage(rho=0.0) <= 0.99


@pytest.mark.parametrize("rho", [0.5, 0.7])
def test_autocorrelated_blocks_stretch_the_interval(monkeypatch, rho):
    stretched = coverage(rho)
    monkeypatch.setattr("toolchain.bench.intervals.stretch", lambda sessions: 1.0)
    assert stretched >= 0.89
    assert coverage(rho) < 0.8


@pytest.mark.parametrize("disagreement", [0.0, 0.003, 0.01])
def test_sessions_that_disagree_widen_the_interval(disagreement):
    """The spread of a block is 0.01; few sessions know their spread badly, so that not all of 95 % is reached."""
    assert coverage(0.0, 6, disagreement) >= 0.88


def test_without_drawing_sessions_their_disagreement_would_be_missed(monkeypatch):
    monkeypatch.setattr("toolchain.bench.intervals.HIERARCHICAL", 100)
    assert coverage(0.0, 6, 0.01) < 0.6


def test_deviations_are_stretched_only_where_there_is_a_reason():
    rng = np.random.default_rng(0)
    assert stretch([rng.standard_normal(400)]) == 1.0
    drifting = [ar1(rng, 400, 0.8)]
    assert lag1_autocorrelation(drifting) == pytest.approx(0.8, abs=0.1)
    assert stretch(drifting) == pytest.approx(3.0, rel=0.3)
    assert stretch([np.ones(20)]) == 1.0
    assert stretch([np.arange(4.0)]) < 6.3  # at most as for a correlation of 0.95
    assert stretch([rng.standard_normal(20) for _ in range(5)]) == pytest.approx(math.sqrt(5 / 4))


def test_a_tail_needs_samples():
    assert tail(range(499), 0.9) is None
    assert tail(range(501), 0.9) == pytest.approx(450)
    assert tail(range(4999), 0.99) is None
    assert tail(range(5001), 0.99) == pytest.approx(4950)


def test_a_session_that_sits_higher_is_no_autocorrelation():
    rng = np.random.default_rng(0)
    assert abs(lag1_autocorrelation([rng.standard_normal(200), 50 + rng.standard_normal(200)])) < 0.15


@given(drift=st.lists(st.floats(0.2, 5.0), min_size=8, max_size=40), speed=st.floats(0.1, 10))
def test_what_slows_both_variants_of_a_block_cancels(drift, speed):
    a = [[round(1e9 * d)] * 3 for d in drift]
    b = [[round(1e9 * d * speed)] * 3 for d in drift]
    np.testing.assert_allclose(block_log_ratios(b, a), math.log(speed), atol=1e-7)


def test_spikes_inside_slots_and_whole_spoilt_blocks_do_not_move_the_interval():
    rng = np.random.default_rng(3)
    quiet = [rng.normal(1e6, 3e3, 9).astype(int) for _ in range(60)]
    b = [rng.normal(0.8e6, 3e3, 9).astype(int) for _ in range(60)]
    for index, slot in enumerate(b):
        slot[index % 9] *= 50
    for spoilt in (5, 25, 45):
        b[spoilt] = b[spoilt] * 10
    interval = median_interval([block_log_ratios(b[i : i + 20], quiet[i : i + 20]) for i in (0, 20, 40)])
    for end in (interval.lo, interval.hi):
        assert end == pytest.approx(math.log(0.8), abs=0.003)


def test_every_resample_holds_every_session_in_full():
    # Three of five blocks at 0 and all of the others at 1: a resample that mixed sessions could have median 1.
    medians = bootstrap_medians([np.zeros(30), np.ones(20)], resamples=500)
    assert set(medians) == {0.0}


def test_the_seed_decides_and_each_look_widens():
    rng = np.random.default_rng(0)
    data = [rng.standard_normal(20) for _ in range(3)]
    assert median_interval(data, seed=1) == median_interval(data, seed=1)
    assert median_interval(data, looks=4).half_width > median_interval(data).half_width


def test_ratios_are_exponentials():
    assert Interval(0.0, math.log(0.5), math.log(2)).to_ratio() == pytest.approx({"point": 1, "lo": 0.5, "hi": 2})
