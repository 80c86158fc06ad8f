"""Ways held against that of the tool image by image: what is left of each, and how much more it errs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from judging import relative
from kinds.compression import unpack
from pages.real import PARTS, RESAMPLES
from pages.stats import ALPHA, Estimate, paired_difference
from pages.text import markdown, percent
from records import Record

SETS = (
    *((name, "judge", part) for name, part in PARTS.items()),
    ("drawings", "drawings", ""),
    ("tuning", "tuning", ""),
)
"""Name of pictures → the set that they are in, and what the names of their classes begin with."""


def table(record: Record, what: str, base: str) -> str:
    """All outcomes of a record.

    Args:
        record: its outcomes have a budget, a way and what became of each image.
        what: the ways are of.
        base: the way that the others are held against, within the same budget.
    """
    dense, outcomes = record.result["judged"], record.result["outcomes"]
    bases = {each["budget"]: each["judged"] for each in outcomes if each["way"] == base}
    pairs = [(_sized(each, record), bases.get(each["budget"], {}) if each["way"] != base else {}) for each in outcomes]
    return errors(dense, what, base, pairs) if "test" in dense else features(what, base, pairs)


def _sized(outcome: Mapping[str, Any], record: Record) -> Mapping[str, Any]:
    """An outcome whose way says what share of the dense weights in fp32 its file is, if it has one."""
    if "bytes" not in outcome:
        return outcome
    share = outcome["bytes"] / (4 * record.result["dense"])
    return {**outcome, "way": f"{outcome['way']}: {percent(share)} of the bytes"}


Pairs = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Outcomes, each with what became of each image by the way that it is held against; nothing if that is its own."""


def errors(dense: Mapping[str, Any], what: str, base: str, pairs: Pairs) -> str:
    """Of classifiers: errors, and how many more, as a share of the dense model's."""
    validation, test = dense["validation"], dense["test"]
    rows = [["100 %", "dense", "0", str(validation["wrong"]), str(test["wrong"]), ""]]
    for each, other in pairs:
        own, more = each["judged"], ""
        if other:
            wrong = (~unpack(judged["test"])[None] for judged in (own, other, dense))
            more = shown(paired_difference(*wrong), lambda share: percent(share, signed=True))
        counts = (str(own[split]["wrong"]) for split in ("validation", "test"))
        rows.append([f"{100 * each['budget']:g} %", way(each), f"{own['validation']['kl']:.3g}", *counts, more])
    names = ["KL, validation", f"wrong of {validation['total']}, validation", f"wrong of {test['total']}, test"]
    return markdown(["parameters", what, *names, f"errors more than {base}"], rows)


def features(what: str, base: str, pairs: Pairs) -> str:
    """Of the backbone: relative errors of its features on each set, and how much more."""
    rows = [
        [f"{100 * each['budget']:g} %", way(each), name, *_errors(each["judged"][of], other.get(of), part)]
        for each, other in pairs
        for name, of, part in SETS
    ]
    names = [name for token in ("class token", "patches") for name in (token, f"more than {base}")]
    return markdown(["parameters", what, "pictures", *names], rows)


def _errors(own: Mapping[str, Any], other: Mapping[str, Any] | None, part: str) -> Iterator[str]:
    chosen = [at for at, name in enumerate(own["names"]) if name.startswith(part)]
    for token in ("class", "patches"):
        yield f"{relative(own[token], chosen):.3f}"
        yield "" if other is None else shown(further(own[token], other[token], chosen), lambda error: f"{error:+.3f}")


def further(
    own: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], chosen: Sequence[int]
) -> Estimate:
    """How much larger the relative error of one model is than that of another, over pictures at some places.

    The interval is a 95 % percentile interval of a bootstrap over pictures, which both models have seen alike.
    """
    apart = (np.array(own["wrong"]) - np.array(other["wrong"]))[chosen]
    spread = np.array(own["spread"])[chosen]
    drawn = np.random.default_rng(0).multinomial(len(apart), np.full(len(apart), 1 / len(apart)), size=RESAMPLES)
    lo, hi = np.quantile((drawn @ apart) / (drawn @ spread), [ALPHA / 2, 1 - ALPHA / 2])
    return Estimate(float(apart.sum() / spread.sum()), float(lo), float(hi))


def shown(estimate: Estimate, text: Callable[[float], str]) -> str:
    """An estimate with its interval, each number as `text` gives it."""
    return f"{text(estimate.point)} [{text(estimate.lo)}, {text(estimate.hi)}]"


def way(outcome: Mapping[str, Any]) -> str:
    """The name of an outcome's way, and whether it came to nothing."""
    kept = outcome.get("facts", {}).get("kept")
    return f"{outcome['way']}, not kept" if kept == "before" else str(outcome["way"])
