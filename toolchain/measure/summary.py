"""A comparison in one line that claims no more than the samples show."""

from __future__ import annotations

import math

from toolchain.measure.comparison import Comparison
from toolchain.measure.intervals import outward, too_few


def summary(comparison: Comparison) -> str:
    """One line: the verdict, what it allows to say, and the evidence.

    Bounds are rounded towards the weaker claim, so the line never says more than the samples do.
    """
    ratio = comparison.ratio.to_ratio()
    control, tau = comparison.control, comparison.design.tau
    speed = f"{1 / ratio['point']:.2f}×"
    verified = comparison.verified_speedup_at_least
    said = {
        "improved": f"{speed} (verified ≥ {math.floor((verified or 1.0) * 100) / 100:.2f}×)",
        "regressed": f"{ratio['point']:.2f}× the time of the baseline (at least {math.floor(ratio['lo'] * 100) / 100:.2f}×)",
        "pass": f"not slower beyond {_percent(tau)}; {speed}, a speedup is not verified",
        "inconclusive": f"{speed}, not verified; {_doubt(comparison)}",
        "invalid": f"not verified; the control strays too far, this run supports τ ≥ {math.ceil(comparison.tau_min * 1000) / 10:.1f} %",
    }[comparison.verdict]
    evidence = [
        f"ratio {ratio['point']:.2f} {outward(ratio['lo'], ratio['hi'])} at {100 * (1 - comparison.design.alpha / comparison.design.looks):.3g} %",
        f"control ±{_percent(abs(control.point) + control.half_width)}",
        f"τ {_percent(tau)}",
        f"{comparison.blocks} blocks in {len(comparison.sessions)} sessions",
        *([f"look {comparison.looks} of {comparison.design.looks}"] if comparison.design.looks > 1 else []),
        *(["parity not claimed"] if comparison.parity == "not claimed" else []),
        *(["A and B are the same file"] if comparison.of_one_file else []),
    ]
    return f"{comparison.verdict}: {said}, {', '.join(evidence)}"


def _doubt(comparison: Comparison) -> str:
    """Why nothing can be said: too few sessions, or an interval that holds the limit."""
    medians, tau = comparison.session_medians, comparison.design.tau
    if len(medians) == 1:
        return "one process does not show what processes differ by"
    if too_few(medians, tau):
        return f"sessions differ by {_percent(max(medians) - min(medians))}"
    return "the interval holds the limit"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
