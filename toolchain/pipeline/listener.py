"""How far training is, for whoever watches a run."""

from __future__ import annotations

from collections.abc import Callable

from toolchain.progress import Watcher
from toolchain.training.loop import Progress


def on_epoch(listener: Watcher) -> Callable[[Progress], None]:
    """A training callback that tells a watcher."""

    def told(progress: Progress) -> None:
        share = ((progress.epoch - 1) + progress.step / progress.steps) / progress.epochs
        listener.at(share, f"epoch {progress.epoch}/{progress.epochs}, loss {progress.loss:.3f}")

    return told
