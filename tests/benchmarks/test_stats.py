from __future__ import annotations

import itertools

import numpy as np
import pytest
from pages.stats import mean_sd, paired_difference, relative_increase


def outcomes(seed: int, seeds: int, images: int, shares=(0.25, 0.2, 0.15)):
    rng = np.random.default_rng(seed)
    hard = rng.random(images)  # an image that is hard for one model is hard for the others
    return [(rng.random((seeds, images)) * 0.5 + hard * 0.5) < share * 1.4 for share in shares]


def by_hand(first, second, dense, picked):
    per_seed = [
        (sum(first[s, i] for i in picked) - sum(second[s, i] for i in picked))
        / max(1, sum(dense[s, i] for i in picked))
        for s in range(len(first))
    ]
    return sum(per_seed) / len(per_seed)


def test_the_point_is_the_mean_over_seeds_of_the_difference_of_error_increases():
    first, second, dense = outcomes(0, 3, 500)
    found = paired_difference(first, second, dense)
    increases = [
        np.mean([relative_increase(int(m[s].sum()), int(dense[s].sum())) for s in range(3)]) for m in (first, second)
    ]
    assert found.point == pytest.approx(increases[0] - increases[1])
    assert found.lo < found.point < found.hi


def test_the_bounds_are_those_of_all_resamples_of_a_tiny_test_set():
    """Four images: all 4⁴ resamples, each as likely as the others, give the exact quantiles."""
    first = np.array([[1, 1, 0, 1], [1, 0, 1, 0]], dtype=bool)
    second = np.array([[0, 1, 0, 0], [0, 0, 1, 1]], dtype=bool)
    dense = np.array([[1, 0, 1, 1], [1, 1, 0, 1]], dtype=bool)
    exact = [by_hand(first, second, dense, picked) for picked in itertools.product(range(4), repeat=4)]
    found = paired_difference(first, second, dense, resamples=100_000)
    assert (found.lo, found.hi) == tuple(np.quantile(exact, [0.025, 0.975]))


def test_the_bounds_are_those_of_drawing_images_one_by_one():
    first, second, dense = outcomes(1, 2, 300)
    rng = np.random.default_rng(5)
    draws = rng.integers(0, 300, (4000, 300))
    slow = [np.mean([(first[s, d].sum() - second[s, d].sum()) / dense[s, d].sum() for s in range(2)]) for d in draws]
    found = paired_difference(first, second, dense)
    width = found.hi - found.lo
    assert np.quantile(slow, [0.025, 0.975]) == pytest.approx([found.lo, found.hi], abs=0.06 * width)


def test_seeds_see_the_same_images_so_copies_of_a_seed_narrow_nothing():
    first, second, dense = outcomes(2, 1, 400)
    one = paired_difference(first, second, dense)
    four = paired_difference(*(np.repeat(each, 4, axis=0) for each in (first, second, dense)))
    assert four == one


def test_pairing_narrows_the_interval():
    first, _, dense = outcomes(3, 1, 2000)
    second = first ^ (np.random.default_rng(1).random(first.shape) < 0.02)  # wrong on almost the same images
    paired = paired_difference(first, second, dense)
    shuffled = np.random.default_rng(0).permutation(2000)
    apart = paired_difference(first, second[:, shuffled], dense)
    assert paired.hi - paired.lo < 0.5 * (apart.hi - apart.lo)


def test_equal_seeds_give_equal_bounds_and_a_model_differs_not_from_itself():
    first, second, dense = outcomes(4, 2, 200)
    assert paired_difference(first, second, dense, seed=3) == paired_difference(first, second, dense, seed=3)
    same = paired_difference(first, first, dense)
    assert (same.point, same.lo, same.hi) == (0, 0, 0)
    assert not same.excludes_zero


def test_what_cannot_be_compared_is_refused():
    first, second, dense = outcomes(5, 2, 50)
    with pytest.raises(ValueError, match="paired"):
        paired_difference(first, second[:, :40], dense)
    with pytest.raises(ValueError, match="no error"):
        paired_difference(first, second, np.zeros_like(dense))
    with pytest.raises(ValueError, match="no error"):
        relative_increase(3, 0)


def test_mean_and_sample_deviation():
    assert mean_sd([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_sd([1.0]) == (1.0, None)
