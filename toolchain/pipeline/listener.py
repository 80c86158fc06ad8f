"""Who is told how far a run is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from toolchain.pipeline.folder import Done
from toolchain.training.loop import Progress


class Listener(Protocol):
    """Who is told how far a run is."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def progress(self, share: float, text: str) -> None:
        """`share` of the stage is done."""
        ...

    def done(self, name: str, done: Done) -> None:
        """A stage ended."""
        ...


class Silent:
    """A listener that does nothing."""

    def stage(self, name: str) -> None: ...

    def progress(self, share: float, text: str) -> None: ...

    def done(self, name: str, done: Done) -> None: ...


def on_epoch(listener: Listener) -> Callable[[Progress], None]:
    """A training callback that tells a listener."""

    def told(progress: Progress) -> None:
        share = ((progress.epoch - 1) + progress.step / progress.steps) / progress.epochs
        listener.progress(share, f"epoch {progress.epoch}/{progress.epochs}, loss {progress.loss:.3f}")

    return told
