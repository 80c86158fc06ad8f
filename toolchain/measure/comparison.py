"""A comparison of B with A: raw samples, and the verdict that follows from them and from nothing else.

Statistics are recomputed from the samples whenever they are asked for. The file that is written shows them too, and is
refused on loading if they do not follow from the samples in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import model_validator

from toolchain.measure import stored
from toolchain.measure.intervals import Interval, block_log_ratios, outward, too_few
from toolchain.measure.sampled import Sampled, require_sessions
from toolchain.measure.samples import CONTROL, VARIANTS, A, ArtifactFacts, B, Parity

SCHEMA = "slimvit.bench/2"
Verdict = Literal["invalid", "regressed", "improved", "pass", "inconclusive"]
UNDECIDED = ("invalid", "inconclusive")
"""Verdicts after which the data grows, if there are looks left."""
Undecided = Callable[["Comparison"], bool]
"""Whether what is asked of a comparison needs more data."""


def without_verdict(found: Comparison) -> bool:
    """Whether the verdict is none yet: what a comparison grows by where nothing else is asked of it."""
    return found.verdict in UNDECIDED


def judge(ratio: Interval, control: Interval, session_medians: Sequence[float], tau: float) -> Verdict:
    """The verdict at tolerance tau: validity first, then regressed, improved, pass, in this order.

    Sessions that are `intervals.too_few` to speak for what was timed are inconclusive.
    """
    if abs(control.point) > tau / 3 or control.half_width > tau / 2:
        return "invalid"
    if too_few(session_medians, tau):
        return "inconclusive"
    if ratio.lo > math.log1p(tau):
        return "regressed"
    if ratio.hi < -(abs(control.point) + control.half_width):
        return "improved"
    return "pass" if ratio.hi < math.log1p(tau) else "inconclusive"


class Comparison(Sampled):
    """B against A: the design, the raw samples, and as properties all that follows from them.

    Ratios are time of B over time of A: below 1, B is faster.

    Raises:
        ValidationError: the samples are not those that the design asks for, or come from different machines.
    """

    name: ClassVar[str] = SCHEMA

    parity: Parity
    artifacts: dict[Literal["A", "B"], ArtifactFacts]

    @model_validator(mode="after")
    def _samples_fit_the_design(self) -> Comparison:
        design, numbers = self.design, [session.session for session in self.sessions]
        looks, rest = divmod(len(numbers), design.sessions)
        if numbers != list(range(len(numbers))) or rest or not 1 <= looks <= design.looks:
            raise ValueError(
                f"expected sessions 0…{design.sessions - 1} in each of at most {design.looks} looks, got {numbers}"
            )
        require_sessions(self.sessions, design, self.scenario, VARIANTS)
        return self

    def at_look(self, look: int) -> Comparison:
        """The comparison as it was at one of its looks, 1…`looks`."""
        if look == self.looks:
            return self
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return Comparison(**{**fields, "sessions": self.sessions[: look * self.design.sessions]})

    def require_looks(self, undecided: Undecided = without_verdict) -> None:
        """Raises ValueError unless the data grew exactly until it decided, so that no look was left out or added.

        Args:
            undecided: what it was to grow by.
        """
        for look in range(1, self.looks):
            if not undecided(self.at_look(look)):
                raise ValueError(f"look {look} had decided already, yet there are {self.looks}")
        if self.looks < self.design.looks and undecided(self):
            raise ValueError(f"look {self.looks} of {self.design.looks} had not decided, and the next are missing")

    @property
    def of_one_file(self) -> bool:
        """Whether A and B hold the same bytes, so that the comparison says nothing of a change."""
        return self.artifacts[A].sha256 == self.artifacts[B].sha256

    @property
    def looks(self) -> int:
        """The number of looks at which the data was judged."""
        return len(self.sessions) // self.design.sessions

    @cached_property
    def ratio(self) -> Interval:
        """ln(B/A) with its bootstrap interval."""
        return self.log_ratio(B, A, self.design.looks)

    @cached_property
    def control(self) -> Interval:
        return self.log_ratio(CONTROL, A, self.design.looks)

    @cached_property
    def session_medians(self) -> list[float]:
        """The median of ln(B/A) of each session."""
        return [float(np.median(block_log_ratios(each.slots_ns(B), each.slots_ns(A)))) for each in self.sessions]

    @property
    def verdict(self) -> Verdict:
        """The verdict at tolerance `design.tau`."""
        return judge(self.ratio, self.control, self.session_medians, self.design.tau)

    @property
    def verified_speedup_at_least(self) -> float | None:
        """The lower confidence bound of the speedup, or None unless the verdict is "improved"."""
        return math.exp(-self.ratio.hi) if self.verdict == "improved" else None

    @property
    def headline(self) -> str:
        """One line: the verdict, what it allows to say, and the evidence.

        Bounds are rounded towards the weaker claim, so the line never says more than the samples do.
        """
        ratio = self.ratio.to_ratio()
        control, design = self.control, self.design
        speed = f"{1 / ratio['point']:.2f}×"
        verified = self.verified_speedup_at_least
        said = {
            "improved": f"{speed} (verified ≥ {math.floor((verified or 1.0) * 100) / 100:.2f}×)",
            "regressed": f"{ratio['point']:.2f}× the time of the baseline (at least {math.floor(ratio['lo'] * 100) / 100:.2f}×)",
            "pass": f"not slower beyond {_percent(design.tau)}; {speed}, a speedup is not verified",
            "inconclusive": f"{speed}, not verified; {self._doubt}",
            "invalid": f"not verified; the control strays too far, this run supports τ ≥ {math.ceil(self.tau_min * 1000) / 10:.1f} %",
        }[self.verdict]
        evidence = [
            f"ratio {ratio['point']:.2f} {outward(ratio['lo'], ratio['hi'])} at {100 * (1 - design.alpha / design.looks):.3g} %",
            f"control ±{_percent(abs(control.point) + control.half_width)}",
            f"τ {_percent(design.tau)}",
            f"{self.blocks} blocks in {len(self.sessions)} sessions",
            *([f"look {self.looks} of {design.looks}"] if design.looks > 1 else []),
            *(["parity not claimed"] if self.parity == "not claimed" else []),
            *(["A and B are the same file"] if self.of_one_file else []),
        ]
        return f"{self.verdict}: {said}, {', '.join(evidence)}"

    @property
    def _doubt(self) -> str:
        """Why nothing can be said: too few sessions, or an interval that holds the limit."""
        medians = self.session_medians
        if len(medians) == 1:
            return "one process does not show what processes differ by"
        if too_few(medians, self.design.tau):
            return f"sessions differ by {_percent(max(medians) - min(medians))}"
        return "the interval holds the limit"

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the verdict, and both latencies."""
        rows = [f"| {self.artifacts[name].name} | {self.latency_ms(name):.3f} ms |" for name in (A, B)]
        return "\n".join([f"**{self.headline}**", "", "| file | median latency |", "|---|---|", *rows])

    def to_dict(self) -> dict[str, object]:
        """The JSON object of `bench compare --json`: the statistics and, under `raw`, what they follow from."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "ratio": self.ratio.to_ratio(),
            "verified_speedup_at_least": self.verified_speedup_at_least,
            "control": self.control.to_ratio(),
            "latency_ms": {name: self.latency_ms(name) for name in (A, B)},
            "p90_ms": {name: self.tail_ms(name, 0.9) for name in (A, B)},
            "p99_ms": {name: self.tail_ms(name, 0.99) for name in (A, B)},
            "samples_per_second": {name: 1e3 * self.scenario.batch / self.latency_ms(name) for name in (A, B)},
            "tau": self.design.tau,
            "tau_min": self.tau_min,
            "confidence": 1 - self.design.alpha / self.design.looks,
            "looks": self.looks,
            "sessions": len(self.sessions),
            "blocks": self.blocks,
            "parity": self.parity,
            **self.sealed(),
        }

    @classmethod
    def parsed(cls, text: str, undecided: Undecided = without_verdict) -> Self:
        """As its base; raises ValueError also where the data did not grow by `undecided`."""
        found = super().parsed(text)
        found.require_looks(undecided)
        return found

    @staticmethod
    def recomputed(found: Any, where: str, undecided: Undecided = without_verdict) -> Comparison:
        """The comparison in a JSON object that grew by `undecided`; other arguments and errors as `stored.recomputed`."""
        return stored.recomputed(found, where, SCHEMA, partial(Comparison.parsed, undecided=undecided))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
