import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.measure import intervals
from toolchain.measure.intervals import (
    Interval,
    block_log_ratios,
    bootstrap_medians,
    median_interval,
    row_medians,
    session_error,
    slot_medians,
    tail,
)

TRUTH = -0.3


def ar1(rng, size, rho, scale=0.01, burn_in=50):
    noise = rng.standard_normal(size + burn_in) * scale
    for t in range(1, len(noise)):
        noise[t] += rho * noise[t - 1]
    return noise[burn_in:]


@pytest.fixture
def unseen(monkeypatch):
    """The error between sessions sees none."""
    monkeypatch.setattr(intervals, "session_error", lambda _sessions: 0.0)


def coverage(rho, sessions=3, disagreement=0.0, repeats=200):
    hits = 0
    for seed in range(repeats):
        rng = np.random.default_rng(seed)
        data = [TRUTH + ar1(rng, 20, rho) + disagreement * rng.standard_normal() for _ in range(sessions)]
        interval = median_interval(data, resamples=400, seed=seed)
        hits += interval.lo <= TRUTH <= interval.hi
    return hits / repeats


def test_an_interval_of_independent_blocks_holds_the_truth_and_is_no_wider_than_it_must_be():
    assert coverage(rho=0.0) >= 0.94
    rng = np.random.default_rng(0)
    widths = [
        median_interval([ar1(rng, 20, 0.0) for _ in range(3)], resamples=400, seed=seed).half_width
        for seed in range(50)
    ]
    exact = 4.303 * 1.25 * 0.01 / math.sqrt(60)  # t with 2 degrees of freedom, the error of a median of 60 blocks
    assert 0.7 * exact < np.mean(widths) < 1.4 * exact


@pytest.mark.parametrize("rho", [0.5, 0.7])
def test_autocorrelated_blocks_are_seen_between_sessions(rho):
    assert coverage(rho) >= 0.92


@pytest.mark.parametrize("rho", [0.5, 0.7])
@pytest.mark.usefixtures("unseen")
def test_without_that_autocorrelated_blocks_would_be_missed(rho):
    assert coverage(rho) < 0.8


@pytest.mark.parametrize("sessions", [3, 6])
@pytest.mark.parametrize("disagreement", [0.0, 0.003, 0.01, 0.03])
def test_sessions_that_disagree_widen_the_interval(disagreement, sessions):
    """The spread of a block is 0.01, that of a session's median of 20 blocks 0.003."""
    assert coverage(0.0, sessions, disagreement) >= 0.9


@pytest.mark.parametrize("sessions", [3, 6])
@pytest.mark.usefixtures("unseen")
def test_without_that_their_disagreement_would_be_missed(sessions):
    assert coverage(0.0, sessions, 0.01) < 0.7


def test_the_error_between_sessions():
    equal = [np.full(20, level) for level in (0.0, 0.1, 0.2)]
    assert session_error(equal) == pytest.approx(0.1 / math.sqrt(3))
    assert session_error(equal[:1]) == 0.0
    assert session_error([np.zeros(20), np.zeros(40)]) == 0.0
    found = median_interval(equal, seed=1)
    assert found.hi - found.point == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=0.01)  # t with 2 degrees of freedom


@pytest.mark.parametrize("count", [1, 2, 5, 40, 121])
def test_medians_of_rows_are_numpys_to_the_bit(count):
    rows = np.random.default_rng(count).standard_normal((200, count))
    assert row_medians(rows).tobytes() == np.median(rows, axis=1).tobytes()


@given(st.lists(st.lists(st.integers(1, 10**12), min_size=1, max_size=9), min_size=1, max_size=5))
def test_medians_of_slots_are_numpys_to_the_bit(slots):
    assert slot_medians(slots).tobytes() == np.array([np.median(samples) for samples in slots]).tobytes()


def test_a_tail_needs_samples():
    assert tail(range(499), 0.9) is None
    assert tail(range(501), 0.9) == pytest.approx(450)
    assert tail(range(4999), 0.99) is None
    assert tail(range(5001), 0.99) == pytest.approx(4950)


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


@pytest.mark.usefixtures("unseen")
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
