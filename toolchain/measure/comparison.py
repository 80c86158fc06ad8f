"""A comparison of B with A: raw samples, and the verdict that follows from them and from nothing else.

Statistics are recomputed from the samples whenever they are asked for. The file that is written shows them too, and is
refused on loading if they do not follow from the samples in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import JsonValue, model_validator

from toolchain.measure import stored
from toolchain.measure.environment import machine_changes
from toolchain.measure.intervals import (
    Interval,
    block_log_ratios,
    median_interval,
    slot_medians,
    tail,
    too_few,
)
from toolchain.measure.samples import CONTROL, VARIANTS, A, ArtifactFacts, B, Design, Parity, Scenario, Session
from toolchain.on_device.runner import block_orders
from toolchain.records import Record

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


@dataclass(frozen=True)
class Judgement:
    """What follows from some sessions: ln(B/A), ln(A'/A), each session's median of ln(B/A), and the verdict."""

    ratio: Interval
    control: Interval
    session_medians: list[float]
    verdict: Verdict


def judged(sessions: Sequence[Session], design: Design) -> Judgement:
    """The judgement at one look, at confidence 1 − alpha/looks."""
    ratios, controls = (
        [block_log_ratios(session.slots_ns(name), session.slots_ns(A)) for session in sessions] for name in (B, CONTROL)
    )
    ratio, control = (
        median_interval(each, alpha=design.alpha, looks=design.looks, seed=design.seed) for each in (ratios, controls)
    )
    medians = [float(np.median(each)) for each in ratios]
    return Judgement(ratio, control, medians, judge(ratio, control, medians, design.tau))


def require_sessions(sessions: Sequence[Session], design: Design, scenario: Scenario, variants: Sequence[str]) -> None:
    """Raises ValueError unless the samples are those that a design asks for, all of one machine."""
    for session in sessions:
        where, blocks = f"session {session.session}", design.blocks_of(session.session)
        if set(session.variants) != set(variants):
            raise ValueError(f"{where}: expected the variants {tuple(variants)}, got {tuple(session.variants)}")
        orders = block_orders(variants, blocks, design.seed, session.session)
        if [list(block.order) for block in session.blocks] != orders:
            raise ValueError(f"{where}: the blocks are not the {blocks} that seed {design.seed} orders")
        for name, facts in session.variants.items():
            kept = facts.calls_per_slot - facts.discarded
            if any(len(block.samples_ns.get(name, ())) != kept for block in session.blocks):
                raise ValueError(f"{where}: a block of {name} does not hold {kept} samples")
    prints = [fp for s in sessions for fp in (s.fingerprint.before, s.fingerprint.after)]
    if changes := machine_changes(prints):
        raise ValueError(f"the machine changed while it was measured: {'; '.join(changes)}")
    for key, wanted in (("threads", scenario.threads), ("affinity", scenario.affinity)):
        found = prints[0].machine.get(key)
        if wanted is not None and (tuple(found) if isinstance(found, list) else found) != wanted:
            raise ValueError(f"the scenario says {key} {wanted}, the samples were taken with {found}")


class Comparison(Record):
    """B against A: the design, the raw samples, and as properties all that follows from them.

    Ratios are time of B over time of A: below 1, B is faster.

    Raises:
        ValidationError: the samples are not those that the design asks for, or come from different machines.
    """

    name: ClassVar[str] = SCHEMA

    scenario: Scenario
    design: Design
    parity: Parity
    artifacts: dict[Literal["A", "B"], ArtifactFacts]
    sessions: tuple[Session, ...]

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
        return Comparison(**{**dict(self), "sessions": self.sessions[: look * self.design.sessions]})

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

    @cached_property
    def _judgement(self) -> Judgement:
        return judged(self.sessions, self.design)

    @property
    def of_one_file(self) -> bool:
        """Whether A and B hold the same bytes, so that the comparison says nothing of a change."""
        return self.artifacts[A].sha256 == self.artifacts[B].sha256

    @property
    def looks(self) -> int:
        """The number of looks at which the data was judged."""
        return len(self.sessions) // self.design.sessions

    @property
    def blocks(self) -> int:
        """Over all sessions."""
        return sum(len(session.blocks) for session in self.sessions)

    @property
    def ratio(self) -> Interval:
        """ln(B/A) with its bootstrap interval."""
        return self._judgement.ratio

    @property
    def control(self) -> Interval:
        """ln(A'/A), the same file twice: what the protocol sees where there is nothing to see."""
        return self._judgement.control

    @property
    def session_medians(self) -> list[float]:
        """The median of ln(B/A) of each session."""
        return self._judgement.session_medians

    @property
    def verdict(self) -> Verdict:
        """The verdict at tolerance `design.tau`."""
        return self._judgement.verdict

    @property
    def verified_speedup_at_least(self) -> float | None:
        """The lower confidence bound of the speedup, or None unless the verdict is "improved"."""
        return math.exp(-self.ratio.hi) if self.verdict == "improved" else None

    @property
    def tau_min(self) -> float:
        """The smallest tolerance at which this run's control would have been valid."""
        return max(3 * abs(self.control.point), 2 * self.control.half_width)

    def latency_ms(self, variant: str) -> float:
        """The median over all blocks of a variant's slot medians."""
        medians = [slot_medians(session.slots_ns(variant)) for session in self.sessions]
        return float(np.median(np.concatenate(medians))) / 1e6

    def tail_ms(self, variant: str, share: float) -> float | None:
        """A quantile (0.9, 0.99) of single calls; None where there are too few."""
        samples = [each for session in self.sessions for slot in session.slots_ns(variant) for each in slot]
        found = tail(samples, share)
        return None if found is None else found / 1e6

    @property
    def headline(self) -> str:
        """The result in one line."""
        from toolchain.measure.summary import summary  # which reads comparisons

        return summary(self)

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the verdict, and both latencies."""
        rows = [f"| {self.artifacts[name].name} | {self.latency_ms(name):.3f} ms |" for name in (A, B)]
        return "\n".join([f"**{self.headline}**", "", "| file | median latency |", "|---|---|", *rows])

    @property
    def environment(self) -> dict[str, JsonValue]:
        """The machine, the same before and after all sessions."""
        return self.sessions[0].fingerprint.before.machine

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
            "environment": self.environment,
            **stored.sealed(self.model_dump(mode="json", by_alias=True)),
        }

    def save(self, path: Path) -> None:
        """Writes `to_dict` atomically; raises StorageError."""
        stored.save(self, path)

    @staticmethod
    def load(path: Path) -> Comparison:
        """The comparison in a file; raises as `stored.load`."""
        return stored.load(path, SCHEMA, _parser(without_verdict))

    @staticmethod
    def recomputed(found: Any, where: str, undecided: Undecided = without_verdict) -> Comparison:
        """The comparison in a JSON object that grew by `undecided`; other arguments and errors as `stored.recomputed`."""
        return stored.recomputed(found, where, SCHEMA, _parser(undecided))


def _parser(undecided: Undecided) -> Callable[[str], Comparison]:
    def parse(text: str) -> Comparison:
        found = Comparison.model_validate_json(text)
        found.require_looks(undecided)
        return found

    return parse
