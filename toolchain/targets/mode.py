"""The timing mode in a GPU target's name; a module of its own, so that names need no CUDA."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mode:
    """What one sample holds. Without any of them: wall time from enqueueing a call until the host wakes up.

    Attributes:
        graph: the call is captured once as a CUDA graph and replayed, so that launching kernels costs one launch.
        transfers: inputs come from pinned host memory and outputs go back to it, within the sample.
    """

    graph: bool = False
    transfers: bool = False

    @property
    def suffix(self) -> str:
        """What a target's name gets: "", "+graph" or "+graph+transfers"."""
        return "+graph" * self.graph + "+transfers" * self.transfers


EVERY_MODE = (Mode(), Mode(graph=True), Mode(graph=True, transfers=True))
