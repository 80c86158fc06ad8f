"""What a comparison is: its design, its raw samples, and the verdict that follows from them and from nothing else.

Statistics are recomputed from the samples whenever they are asked for. The file that is written shows them too, and is
refused on loading if they do not follow from the samples in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from toolchain.artifact import read_json, write_text
from toolchain.bench.environment import Fingerprint, machine_changes
from toolchain.bench.intervals import Interval, block_log_ratios, median_interval, slot_medians
from toolchain.errors import ArtifactError
from toolchain.targets.device_runner import block_orders

SCHEMA = "slimvit.bench/1"
A: Literal["A"] = "A"
B: Literal["B"] = "B"
CONTROL = "A'"
VARIANTS = (A, B, CONTROL)
"""The baseline, what is compared with it, and the baseline loaded a second time."""

Verdict = Literal["invalid", "regressed", "improved", "pass", "inconclusive"]
Parity = Literal["pass", "not claimed"]
Count = Annotated[int, Field(ge=1)]
Nanoseconds = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InputSpec(_Strict):
    """One input tensor, batch included."""

    shape: tuple[Count, ...]
    dtype: str


class Scenario(_Strict):
    """What is timed: where, with how many threads, on which inputs."""

    target: str
    threads: Count
    batch: Count
    inputs: tuple[InputSpec, ...]

    def file_name(self, precision: str) -> str:
        """The name under `bench/` of the raw samples of this scenario."""
        return f"{self.target}.{precision}.b{self.batch}.t{self.threads}.json"


class Design(_Strict):
    """How it is timed and judged; `looks` counts how often the data was judged while it grew."""

    sessions: Count = 3
    blocks: Annotated[int, Field(ge=4)] = 20
    slot_ms: Annotated[float, Field(gt=0)] = 50.0
    warmup_calls: Count = 10
    warmup_s: Annotated[float, Field(ge=0)] = 1.0
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.05
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    looks: Count = 1
    seed: Annotated[int, Field(ge=0)] = 0


class ArtifactFacts(_Strict):
    """Which bytes were timed; `sha256` is over all files of the artifact, names and contents."""

    name: str
    size_bytes: int
    sha256: str


class VariantFacts(_Strict):
    """How one variant was sampled in one session, and the shapes of its outputs."""

    outputs: tuple[tuple[int, ...], ...]
    warmup_calls: int
    warmup_seconds: float
    call_ns: float
    calls_per_slot: Count
    discarded: Annotated[int, Field(ge=0)]


class Fingerprints(_Strict):
    """The device before the first and after the last slot of a session."""

    before: Fingerprint
    after: Fingerprint


class Block(_Strict):
    """One slot of every variant, in the order in which they ran."""

    order: tuple[str, ...]
    samples_ns: dict[str, tuple[Nanoseconds, ...]]


class Session(_Strict):
    """Everything that one fresh process measured."""

    schema_: Annotated[Literal["slimvit.bench.session/1"], Field(alias="schema")]
    session: Annotated[int, Field(ge=0)]
    fingerprint: Fingerprints
    variants: dict[str, VariantFacts]
    blocks: tuple[Block, ...]

    def slots_ns(self, variant: str) -> list[tuple[int, ...]]:
        """The retained samples of a variant, one tuple per block."""
        return [block.samples_ns[variant] for block in self.blocks]


def judge(ratio: Interval, control: Interval, session_medians: Sequence[float], tau: float) -> Verdict:
    """The verdict at tolerance tau: validity first, then regressed, improved, pass, in this order.

    Sessions whose medians differ by more than tau/2 do not measure one thing: inconclusive.
    """
    if abs(control.point) > tau / 3 or control.half_width > tau / 2:
        return "invalid"
    if max(session_medians) - min(session_medians) > tau / 2:
        return "inconclusive"
    if ratio.lo > math.log1p(tau):
        return "regressed"
    if ratio.hi < -(abs(control.point) + control.half_width):
        return "improved"
    return "pass" if ratio.hi < math.log1p(tau) else "inconclusive"


class Comparison(_Strict):
    """B against A: the design, the raw samples, and as properties all that follows from them.

    Ratios are time of B over time of A: below 1, B is faster.

    Raises:
        ValidationError: the samples are not those that the design asks for, or come from different machines.
    """

    scenario: Scenario
    design: Design
    parity: Parity
    artifacts: dict[Literal["A", "B"], ArtifactFacts]
    sessions: tuple[Session, ...]

    @model_validator(mode="after")
    def _samples_fit_the_design(self) -> Comparison:
        design = self.design
        if [session.session for session in self.sessions] != list(range(design.sessions)):
            raise ValueError(f"expected sessions 0…{design.sessions - 1}, got {[s.session for s in self.sessions]}")
        for session in self.sessions:
            where = f"session {session.session}"
            if set(session.variants) != set(VARIANTS):
                raise ValueError(f"{where}: expected the variants {VARIANTS}, got {tuple(session.variants)}")
            orders = block_orders(VARIANTS, design.blocks, design.seed, session.session)
            if [list(block.order) for block in session.blocks] != orders:
                raise ValueError(f"{where}: the blocks are not the {design.blocks} that seed {design.seed} orders")
            for name, facts in session.variants.items():
                kept = facts.calls_per_slot - facts.discarded
                if any(len(block.samples_ns.get(name, ())) != kept for block in session.blocks):
                    raise ValueError(f"{where}: a block of {name} does not hold {kept} samples")
        prints = [fp for s in self.sessions for fp in (s.fingerprint.before, s.fingerprint.after)]
        if changes := machine_changes(prints):
            raise ValueError(f"the machine changed while it was measured: {'; '.join(changes)}")
        if any(fp.machine.get("threads") != self.scenario.threads for fp in prints):
            raise ValueError(f"the scenario says {self.scenario.threads} threads, the samples were taken with others")
        return self

    @cached_property
    def ratio(self) -> Interval:
        """ln(B/A) with its bootstrap interval."""
        return self._interval(B)

    @cached_property
    def control(self) -> Interval:
        """ln(A'/A), the same file twice: what the protocol sees where there is nothing to see."""
        return self._interval(CONTROL)

    def _interval(self, variant: str) -> Interval:
        design = self.design
        return median_interval(self._log_ratios(variant), alpha=design.alpha, looks=design.looks, seed=design.seed)

    def _log_ratios(self, variant: str) -> list[np.ndarray[tuple[Any, ...], np.dtype[np.float64]]]:
        return [block_log_ratios(session.slots_ns(variant), session.slots_ns(A)) for session in self.sessions]

    @property
    def session_medians(self) -> list[float]:
        """The median of ln(B/A) of each session."""
        return [float(np.median(ratios)) for ratios in self._log_ratios(B)]

    @property
    def verdict(self) -> Verdict:
        """What may be said at tolerance `design.tau`."""
        return judge(self.ratio, self.control, self.session_medians, self.design.tau)

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

    @property
    def environment(self) -> dict[str, Any]:
        """The machine, the same before and after all sessions."""
        return self.sessions[0].fingerprint.before.machine

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `bench compare --json`: the statistics and, under `raw`, what they follow from."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "ratio": self.ratio.to_ratio(),
            "verified_speedup_at_least": self.verified_speedup_at_least,
            "control": self.control.to_ratio(),
            "latency_ms": {name: self.latency_ms(name) for name in (A, B)},
            "tau": self.design.tau,
            "tau_min": self.tau_min,
            "sessions": self.design.sessions,
            "blocks": self.design.blocks,
            "parity": self.parity,
            "environment": self.environment,
            "raw": self.model_dump(mode="json", by_alias=True),
        }

    def save(self, path: Path) -> None:
        """Writes `to_dict` atomically; raises StorageError."""
        write_text(path, json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False) + "\n")

    @staticmethod
    def load(path: Path) -> Comparison:
        """The comparison in a file.

        Raises:
            StorageError: the file cannot be read.
            ArtifactError: it has another schema, its samples are not those its design asks for, or a statistic in it
                does not follow from its samples.
        """
        stored = read_json(path)
        found = stored.get("schema") if isinstance(stored, dict) else None
        if found != SCHEMA:
            raise ArtifactError(f"{path} has schema {found!r}; this version reads comparisons of schema {SCHEMA!r}")
        raw = stored.pop("raw", None)
        try:
            comparison = Comparison.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            raise ArtifactError(f"{path}: {explain(error)}") from None
        recomputed = comparison.to_dict()
        del recomputed["raw"]
        for key in sorted(stored.keys() | recomputed.keys()):
            if not _equal(stored.get(key), recomputed.get(key)):
                raise ArtifactError(
                    f"{path} says {key} = {stored.get(key)!r}, but its samples give {recomputed.get(key)!r}; "
                    "the file was altered, or written by another version. Measure again."
                )
        return comparison


def explain(error: ValidationError) -> str:
    """One line for the first fault that pydantic found: where it is and what is wrong."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")


def _equal(stored: Any, recomputed: Any) -> bool:
    """Equality up to the last bits of floats, which may differ between builds of numpy."""
    if isinstance(stored, dict) and isinstance(recomputed, dict):
        return stored.keys() == recomputed.keys() and all(_equal(stored[k], recomputed[k]) for k in stored)
    if isinstance(stored, float) and isinstance(recomputed, float):
        return math.isclose(stored, recomputed, rel_tol=1e-9)
    return bool(type(stored) is type(recomputed) and stored == recomputed)
