import math
import re

import pytest
from builders import few_sessions

from toolchain.measure.intervals import outward


def test_a_verified_speedup_is_never_rounded_up(made_up):
    for seed in range(5):
        comparison = made_up(b=math.log(0.7), noise=0.01, seed=seed)
        line = comparison.headline
        assert line.startswith("improved: 1.4")
        assert float(re.search(r"verified ≥ ([\d.]+)×", line)[1]) <= comparison.verified_speedup_at_least
        assert line.endswith("τ 5 %, 60 blocks in 3 sessions")


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ({"b": math.log(2)}, "regressed: 2.00× the time of the baseline (at least"),
        ({}, "pass: not slower beyond 5 %; 1.00×, a speedup is not verified"),
        ({"b": -0.5, "control": 0.03}, "invalid: not verified;"),
        ({"b": -0.5, "session_shift": 0.02}, "inconclusive: 1.62×, not verified; sessions differ by 4"),
        (
            {"b": -0.5, "design": few_sessions(sessions=1)},
            "inconclusive: 1.65×, not verified; one process does not show",
        ),
    ],
)
def test_without_an_improvement_the_line_says_what_was_seen_and_no_more(made_up, truth, words):
    line = made_up(**truth).headline
    assert words in line
    assert "verified ≥" not in line


def test_printed_bounds_hold_those_that_were_found(made_up):
    assert outward(0.6549, 0.6551) == "[0.65, 0.66]"
    assert outward(1.0, 1.25) == "[1.00, 1.25]"
    assert outward(0.9481, 0.9599, 3) == "[0.948, 0.960]"
    comparison = made_up(b=math.log(0.7), noise=0.01)
    lo, hi = map(float, re.search(r"ratio [\d.]+ \[([\d.]+), ([\d.]+)\]", comparison.headline).groups())
    ratio = comparison.ratio.to_ratio()
    assert lo <= ratio["lo"] < ratio["hi"] <= hi


def test_a_tolerance_that_would_have_been_supported_is_rounded_up(made_up):
    truth = {"b": -0.5, "control": 0.03}
    tau = float(re.search(r"supports τ ≥ ([\d.]+) %", made_up(**truth).headline)[1]) / 100
    assert made_up(**truth, design=few_sessions(tau=tau)).verdict == "improved"


def test_one_file_compared_with_itself_is_called_that(made_up):
    comparison = made_up()
    assert "same file" not in comparison.headline
    itself = dict.fromkeys("AB", comparison.artifacts["A"])
    assert comparison.model_copy(update={"artifacts": itself}).headline.endswith("A and B are the same file")


def test_unclaimed_parity_is_said(made_up):
    comparison = made_up()
    assert "parity" not in comparison.headline
    assert comparison.model_copy(update={"parity": "not claimed"}).headline.endswith("parity not claimed")
