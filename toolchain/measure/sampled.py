"""The base of results of one scenario: raw samples of sessions, and the statistics that any such result follows from."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import JsonValue

from toolchain.files import write_text
from toolchain.measure import stored
from toolchain.measure.environment import machine_changes
from toolchain.measure.intervals import Interval, block_log_ratios, median_interval, slot_medians, tail
from toolchain.measure.samples import Design, Scenario, Session
from toolchain.on_device.runner import block_orders
from toolchain.records import Record


class Sampled(Record):
    """What was timed, how, and the raw samples; every statistic is a property that is derived from them.

    A subclass has a `name`, the schema of its files, and checks its samples by `require_sessions`.
    """

    name: ClassVar[str]

    scenario: Scenario
    design: Design
    sessions: tuple[Session, ...]

    @property
    @abstractmethod
    def control(self) -> Interval:
        """ln(A'/A), the same file twice: what the protocol sees where there is nothing to see."""

    @property
    def tau_min(self) -> float:
        """The smallest tolerance at which a comparison with this control is valid."""
        return max(3 * abs(self.control.point), 2 * self.control.half_width)

    @property
    def blocks(self) -> int:
        """Over all sessions."""
        return sum(len(session.blocks) for session in self.sessions)

    @property
    def environment(self) -> dict[str, JsonValue]:
        """The machine, the same before and after all sessions."""
        return self.sessions[0].fingerprint.before.machine

    def latency_ms(self, variant: str) -> float:
        """The median over all blocks of a variant's slot medians."""
        medians = [slot_medians(session.slots_ns(variant)) for session in self.sessions]
        return float(np.median(np.concatenate(medians))) / 1e6

    def tail_ms(self, variant: str, share: float) -> float | None:
        """A quantile (0.9, 0.99) of single calls; None where there are too few."""
        samples = [each for session in self.sessions for slot in session.slots_ns(variant) for each in slot]
        found = tail(samples, share)
        return None if found is None else found / 1e6

    def log_ratio(self, above: str, below: str, looks: int = 1) -> Interval:
        """ln(time of one variant / time of another), with its interval at confidence 1 − alpha/looks."""
        ratios = [block_log_ratios(session.slots_ns(above), session.slots_ns(below)) for session in self.sessions]
        return median_interval(ratios, alpha=self.design.alpha, looks=looks, seed=self.design.seed)

    def sealed(self) -> dict[str, object]:
        """The end of its JSON object: the machine, and the raw samples with their digest."""
        return {"environment": self.environment, **stored.sealed(self.model_dump(mode="json", by_alias=True))}

    @property
    @abstractmethod
    def headline(self) -> str:
        """The result in one line."""

    @abstractmethod
    def to_dict(self) -> dict[str, object]:
        """Its JSON object: the statistics and, under `raw`, what they follow from."""

    @classmethod
    def parsed(cls, text: str) -> Self:
        """The result of the JSON text under `raw`; raises ValidationError or ValueError."""
        return cls.model_validate_json(text)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The result in a file; raises as `stored.load`."""
        return stored.load(path, cls.name, cls.parsed)

    def save(self, path: Path) -> None:
        """Writes `to_dict` atomically; raises StorageError."""
        write_text(path, json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False) + "\n")


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
