"""Cold starts of a cell: fresh processes that open its artifact and its baseline in turns. Nothing is judged here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, JsonValue, model_validator

from toolchain.measure.environment import machine_changes
from toolchain.measure.samples import ArtifactFacts, ColdStart, Scenario
from toolchain.records import Record

LOOKS = (8, 16, 32)
"""After how many pairs of starts the data is judged, at most: each look doubles what there is."""


@dataclass(frozen=True)
class Cost:
    """What a cold start costs in one respect.

    Attributes:
        unit: in words.
        of: the amount of a start; None where the system does not tell it.
        said: the beginning of a sentence about the artifact.
        advice: what to do first where it is too much.
    """

    unit: str
    of: Callable[[ColdStart], float | None]
    said: str
    advice: str


def _milliseconds(start: ColdStart) -> float:
    return (start.open_ns + start.first_ns) / 1e6


def _bytes(start: ColdStart) -> float | None:
    """What the process held at most, less what it held before it loaded the runtime."""
    if start.peak_rss_bytes is None or start.rss_before_bytes is None:
        return None
    return float(max(1, start.peak_rss_bytes - start.rss_before_bytes))


COSTS: Mapping[str, Cost] = {
    "memory": Cost("bytes of memory", _bytes, "The artifact and its runtime take", "Make the artifact smaller"),
    "cold_start": Cost(
        "ms of cold start",
        _milliseconds,
        "Opening the artifact and calling it once takes",
        "Make the artifact smaller or its graph simpler",
    ),
}
"""Key of gate.toml → what it bounds: one entry, and a key in both sections, is one more check."""


class Start(Record):
    """A cold start of the artifact, and the one of its baseline beside it; None without a baseline."""

    artifact: ColdStart
    baseline: ColdStart | None = None


class Starts(Record):
    """Cold starts of a cell, in the order in which they ran; the number of the artifact's is one of LOOKS.

    Raises:
        ValidationError: the machine changed meanwhile, or some starts have a baseline and some have none.
    """

    scenario: Scenario
    artifact: ArtifactFacts
    baseline: ArtifactFacts | None = None
    pairs: Annotated[tuple[Start, ...], Field(min_length=LOOKS[0])]

    @model_validator(mode="after")
    def _belong_together(self) -> Starts:
        if len(self.pairs) not in LOOKS:
            raise ValueError(f"there are {len(self.pairs)} cold starts; expected one of {', '.join(map(str, LOOKS))}")
        if any((pair.baseline is None) != (self.baseline is None) for pair in self.pairs):
            raise ValueError("some cold starts are of a baseline that others lack")
        every = [start for pair in self.pairs for start in (pair.artifact, pair.baseline) if start is not None]
        if len({_bytes(start) is None for start in every}) > 1:
            raise ValueError("some cold starts tell how much memory they took, and some do not")
        if changes := machine_changes([start.fingerprint for start in every]):
            raise ValueError(f"the machine changed while it was measured: {'; '.join(changes)}")
        return self

    @property
    def environment(self) -> dict[str, JsonValue]:
        """The machine, the same for all starts."""
        return self.pairs[0].artifact.fingerprint.machine

    def require_looks(self, needs_more: Callable[[Starts], bool]) -> None:
        """Raises ValueError unless sampling stopped at the first look that decided every check, or at the maximum."""
        for count in LOOKS[: LOOKS.index(len(self.pairs)) + 1]:
            look = self.model_copy(update={"pairs": self.pairs[:count]})
            if count < LOOKS[-1] and needs_more(look) != (count < len(self.pairs)):
                raise ValueError(f"{len(self.pairs)} cold starts were measured, which is not when they decide")
