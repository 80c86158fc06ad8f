"""The result of one check, and the checks that need no timing: counts, features and parity."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from toolchain.gate.evidence import Evidence, Facts
from toolchain.gate.metrics import METRICS
from toolchain.records import Record

Status = Literal["pass", "fail", "accepted", "inconclusive", "invalid", "skipped"]
Number = float | int
ACCEPT = "or accept this value with `slimvit gate accept`"


class Check(Record):
    """One budget or relation of one cell. All but a cosine and an agreement are better lower.

    Attributes:
        name: "budget.size", "relation.latency".
        status: what came of it.
        unit: of the numbers: "bytes", "parameters", "nodes", "wrong images", "ms", "ratio", "cosine", "relative error",
            "top-1 agreement".
        value: of the artifact; for "relation.latency" the ratio of times, artifact over baseline.
        bound: what the value may be at most (a cosine or an agreement: at least); None where it follows from what could not be read.
        baseline: of the baseline; None for a budget.
        total: images that were counted; None but for accuracy.
        lo, hi: confidence bounds of a measured value.
        p_value: of a latency check, one-sided: how likely samples like these are if the bound is kept.
        reason: for a reader: what was found, and what to do where that is not well.
    """

    name: str
    status: Status
    unit: str
    value: Number | None = None
    bound: Number | None = None
    baseline: Number | None = None
    total: int | None = None
    lo: float | None = None
    hi: float | None = None
    p_value: float | None = None
    reason: str = ""

    @property
    def acceptable_up_to(self) -> Number | None:
        """The value that an accept of this check would cover: the upper bound where there is one."""
        return self.value if self.hi is None else self.hi


def _share_of(share: Number | Fraction, whole: int) -> int:
    """The whole part of a share, computed from its decimal digits: 0.1 of 30 is 3."""
    return math.floor(Fraction(str(share)) * whole)


def _bound(asked: Number, baseline: int | None, total: int | None) -> Number:
    """What a count may be at most: an amount, an accuracy of `total` images, or a share more than the baseline's."""
    if total is not None:
        return _share_of(1 - Fraction(str(asked)), total) if baseline is None else baseline + _share_of(asked, total)
    return asked if baseline is None else baseline + _share_of(asked, baseline)


def count_check(name: str, evidence: Evidence, accepted: Number | None) -> Check:
    """The check of a whole number that may be at most its bound, or what was accepted."""
    kind, _, metric = name.partition(".")
    facts, other = evidence.artifact, evidence.baseline if kind == "relation" else None
    value, baseline = facts.counts[metric], other.counts[metric] if other else None
    total = facts.images if metric == "accuracy" else None
    bound = _bound(getattr(getattr(evidence.cell, kind), metric), baseline, total)
    unit = METRICS[metric].unit
    of = "" if total is None else f" of {total:,}"
    against = "" if baseline is None else f", {_change(value - baseline, baseline)} the baseline's {baseline:,}"
    said = [f"There are {value:,} {unit}{of}{against}; at most {bound:,} are allowed."]
    status: Status = "pass"
    if value > bound:
        status = "accepted" if accepted is not None and value <= accepted else "fail"
        if accepted is not None:
            said.append(f"Up to {accepted:,} are accepted.")
        if status == "fail":
            said.append(f"{METRICS[metric].advice}, {ACCEPT}.")
    if metric == "accuracy":
        if doubt := _doubt(facts, other):
            said.append(doubt)
            status = "inconclusive" if other else status
        said += dict.fromkeys((*facts.notes, *(other.notes if other else ())))
    return Check(
        name=name,
        status=status,
        unit=unit,
        value=value,
        bound=bound,
        baseline=baseline,
        total=total,
        reason=" ".join(said),
    )


def unjudged_check(name: str, evidence: Evidence) -> Check:
    """A check that the outputs of the artifact, or of its baseline, do not suit."""
    metric = name.partition(".")[2]
    unit = METRICS[metric].unit if metric in METRICS else "relative error"
    return Check(name=name, status="fail", unit=unit, reason=f"It was not judged: {evidence.unjudged[name]}.")


def _doubt(facts: Facts, other: Facts | None) -> str:
    """Why wrong answers were not counted on pictures that nothing was learned from, or not on the same; "" if they were."""
    if other is not None and facts.pictures != other.pictures:
        return (
            "The artifact and its baseline were judged on different pictures, so that their counts say nothing of each other: leave "
            "the images of [data] alone while the gate runs, and run it again."
        )
    named = {"the artifact": facts, "its baseline": other}
    moved = [name for name, each in named.items() if each is not None and each.split_otherwise]
    if not moved:
        return ""
    return (
        f"The run that made {' and that which made '.join(moved)} split these pictures otherwise, and may have learned from some that "
        "are judged here: give the folder train/, val/ and test/, and run the recipe again."
    )


def _change(change: int, before: int) -> str:
    if change == 0:
        return "equal to"
    share = f" ({100 * change / before:+.2f} %)" if before else ""
    return f"{change:+,}{share} on"


def parity_check(name: str, evidence: Evidence) -> Check:
    """The check of the outputs of an artifact against those of its baseline."""
    assert evidence.agreement is not None
    rung = evidence.agreement.rung
    numbers = []
    if rung.max_abs is not None:
        numbers += [f"max |Δ| {rung.max_abs:.2g}", f"cosine ≥ {rung.cosine_min:.6f}"]
    if rung.top1_agreement is not None:
        numbers.append(f"top-1 agreement {rung.top1_agreement:.4f}")
    shown = f" ({', '.join(numbers)})" if numbers else ""
    otherwise = evidence.prepared_otherwise
    if evidence.parity == "pass":
        said = f"The outputs agree with the baseline's{shown}."
    elif otherwise:
        why = f"; besides, {rung.reason}" if rung.reason else ""
        said = (
            f"The artifact declares another preparation of images than its baseline ({', '.join(otherwise)}), so that pictures give "
            f"other outputs, whatever equal inputs give{shown}{why}. Write the baseline's into it, or name a source in [data] and "
            "there how images are prepared."
        )
    elif rung.verdict == "not_run":
        said = f"The outputs were not judged against the baseline's{shown}: {rung.reason}."
    else:
        why = f": {rung.reason}" if rung.reason else ""
        said = (
            f"The outputs are not the baseline's{shown}{why}. Mend the artifact, or loosen relation.parity if the models "
            "may differ."
        )
    unit, value, bound = "cosine", rung.cosine_min, rung.tolerance.cosine_min
    least, share = rung.tolerance.top1_min, rung.top1_agreement
    if (value is None or value >= bound) and least is not None and share is not None and share < least:
        unit, value, bound = "top-1 agreement", share, least
    return Check(
        name=name,
        status="pass" if evidence.parity == "pass" else "fail",
        unit=unit,
        value=value,
        bound=bound,
        reason=" ".join([said, *evidence.agreement.notes]),
    )


def features_check(name: str, evidence: Evidence) -> Check:
    """The check of the features of an artifact against those of its baseline, where they are worst; a broken bound is the one shown."""
    bounds, judged = evidence.cell.relation.features, evidence.features
    assert bounds is not None
    assert judged is not None
    features, worst = judged.features, judged.features.worst
    if features.error is None or features.cosine is None or worst is None:
        said = "The baseline's features are the same for every image, so that nothing can be held against them; give images that differ."
        return Check(name=name, status="fail", unit="relative error", bound=bounds.error, reason=said)
    checks = [
        *([("relative error", worst.error, bounds.error, worst.error > bounds.error)] if bounds.error else []),
        *([("cosine", worst.cosine, bounds.cosine, worst.cosine < bounds.cosine)] if bounds.cosine else []),
    ]
    unit, value, bound, broken = next((each for each in checks if each[3]), checks[0])
    allowed = [f"a {what} of at {_way(what)} {limit:g}" for what, _, limit, _ in checks]
    said = f"The features have a relative error of {features.error:.4g} and a mean cosine of {features.cosine:.4f} with the baseline's"
    if worst.error_at:
        said += f", at worst {worst.error:.4g} at {worst.error_at} and {worst.cosine:.4f} at {worst.cosine_at}, which is what is judged"
    said += f" ({features.images:,} images); allowed is {' and '.join(allowed)}."
    advice = ["Compress less or train longer, or loosen relation.features."] if broken else []
    return Check(
        name=name,
        status="fail" if broken else "pass",
        unit=unit,
        value=value,
        bound=bound,
        reason=" ".join([said, *advice, *judged.notes]),
    )


def _way(what: str) -> str:
    return "least" if what == "cosine" else "most"
