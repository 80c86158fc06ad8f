"""What a check may be at most, from what gate.toml asks for."""

from __future__ import annotations

import math
from fractions import Fraction

Number = float | int


def bound_of(check: str, asked: Number, *, baseline: Number | None = None, total: int | None = None) -> Number:
    """The bound of a check, in its unit; a cosine's is the least that it may be.

    Args:
        check: its name, "budget.size" or "relation.latency".
        asked: bytes, a count, milliseconds, an accuracy or a cosine; for other relations a share.
        baseline: the baseline's number, which all relations but latency and parity start from.
        total: images that accuracy was counted on.

    Raises:
        ValueError: one of the two is missing.
    """
    kind, _, metric = check.partition(".")
    if metric == "accuracy":
        if total is None:
            raise ValueError(f"{check} needs the number of images")
        if kind == "budget":
            return share_of(1 - Fraction(str(asked)), total)
        return _known(check, baseline) + share_of(asked, total)
    if kind == "budget" or metric == "parity":
        return asked
    if metric == "latency":
        return 1 + asked
    before = _known(check, baseline)
    return before + share_of(asked, before)


def share_of(share: Number | Fraction, whole: Number) -> int:
    """The whole part of a share, computed from its decimal digits: 0.1 of 30 is 3."""
    return math.floor(Fraction(str(share)) * Fraction(whole))


def _known(check: str, baseline: Number | None) -> Number:
    if baseline is None:
        raise ValueError(f"{check} needs the baseline's number")
    return baseline
