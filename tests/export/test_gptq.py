"""GPTQ on small matrices: the codes are what they claim, and no output is moved further than by rounding to the nearest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from toolchain.export.gptq import LEVELS, gptq, nearest, output_error


def problem(inputs, outputs, seed):
    """(W [p, q], C [p, p]) with inputs that say much of each other, as activations do."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((4 * inputs, 3)) @ rng.standard_normal((3, inputs))
    rows += 0.2 * rng.standard_normal(rows.shape)
    return rng.standard_normal((inputs, outputs)).astype(np.float32), rows.T @ rows / len(rows)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (5, 4), (48, 32), (200, 8)])
def test_no_output_is_moved_further_than_by_rounding_to_the_nearest(inputs, outputs):
    weight, covariance = problem(inputs, outputs, inputs)
    ours, plain = (
        output_error(weight - each.weight, covariance) for each in (gptq(weight, covariance), nearest(weight))
    )
    assert (ours <= plain * (1 + 1e-9)).all()
    if inputs > 5:
        assert ours.sum() < 0.4 * plain.sum(), "and most by far less"


def test_codes_have_four_bits_and_scales_are_positive():
    rounded = gptq(*problem(48, 32, 0))
    assert (rounded.codes.dtype, rounded.scales.dtype) == (np.int8, np.float32)
    assert np.abs(rounded.codes).max() == LEVELS
    assert (rounded.scales > 0).all()
    np.testing.assert_array_equal(rounded.weight, rounded.codes.astype(np.float32) * rounded.scales)


def test_inputs_that_say_nothing_of_each_other_are_rounded_to_the_nearest():
    weight, _ = problem(12, 6, 1)
    rounded = gptq(weight, np.diag(np.arange(1.0, 13)))
    np.testing.assert_array_equal(rounded.codes, np.clip(np.rint(weight / rounded.scales), -LEVELS, LEVELS))


def test_of_two_inputs_it_finds_nearly_the_best_there_is():
    """Against all pairs of codes at the same scale."""
    weight, covariance = problem(2, 40, 2)
    rounded = gptq(weight, covariance)
    pairs = np.array([*itertools.product(range(-LEVELS, LEVELS + 1), repeat=2)], float).T  # [2, 225]
    for column in range(40):
        left = weight[:, [column]] - pairs * rounded.scales[column]
        best = output_error(left, covariance).min()
        ours = output_error(weight[:, [column]] - rounded.weight[:, [column]], covariance)[0]
        assert ours <= 1.5 * best + 1e-9


def test_what_is_all_zero_or_never_read_stays_finite():
    weight = np.zeros((6, 2), np.float32)
    weight[:, 1] = np.arange(6)
    rounded = gptq(weight, np.zeros((6, 6)))
    assert np.isfinite(rounded.weight).all()
    assert not rounded.weight[:, 0].any()
