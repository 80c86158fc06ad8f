"""What one sample on a GPU holds, as part of a target's name; without CUDA, which names alone do not need."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import product


@dataclass(frozen=True)
class Mode:
    """What one sample holds. Without any of them: wall time from enqueueing a call until the host wakes up.

    Attributes:
        graph: the call is captured once as a CUDA graph and replayed, so that launching kernels costs one launch.
        spin: the host asks in a loop whether the call has ended, instead of sleeping until it is woken.
        transfers: inputs come from pinned host memory and outputs go back to it, within the sample.
        events: the sample is the time between two CUDA events around the call, without what the host adds.
    """

    graph: bool = False
    spin: bool = False
    transfers: bool = False
    events: bool = False

    @property
    def suffix(self) -> str:
        """What a target's name gets: "" or "+graph+spin", always in the order of the attributes."""
        return "".join(f"+{name}" for name in PARTS if getattr(self, name))


PARTS: tuple[str, ...] = tuple(field.name for field in fields(Mode))
EVERY_MODE: tuple[Mode, ...] = tuple(Mode(*chosen) for chosen in product((False, True), repeat=len(PARTS)))
