"""Progress of some work, and the watchers that receive it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol


class Watcher(Protocol):
    """Receives progress: a terminal, a log, or nothing."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def at(self, share: float, text: str) -> None:
        """`share` of the stage is done, 0…1, and `text` is what is being done."""
        ...

    def done(self, name: str, seconds: float, *, reused: bool) -> None:
        """A stage ended; `reused` if an earlier run had carried it out, in so many seconds."""
        ...


class Nobody:
    """A watcher that does nothing."""

    def stage(self, name: str) -> None: ...

    def at(self, share: float, text: str) -> None: ...

    def done(self, name: str, seconds: float, *, reused: bool) -> None: ...


@dataclass(frozen=True)
class Progress:
    """A part of some work, by default the whole of a stage.

    Attributes:
        watcher: receives the progress.
        start, end: the share of the stage that is done before this part and after it.
        label: stands before the text of every report, if it is not empty.
    """

    watcher: Watcher = Nobody()  # noqa: RUF009 - it holds nothing
    start: float = 0.0
    end: float = 1.0
    label: str = ""

    def at(self, share: float, text: str) -> None:
        """Tells that `share` of this part is done, 0…1, and what is being done."""
        said = f"{self.label}: {text}" if self.label else text
        self.watcher.at(self.start + share * (self.end - self.start), said)

    def part(self, start: float, end: float, label: str = "") -> Progress:
        """A part of this part, from one share of it to another; its label is said in place of this one's."""
        width = self.end - self.start
        return replace(self, start=self.start + start * width, end=self.start + end * width, label=label or self.label)

    def step(self, index: int, count: int, label: str = "") -> Progress:
        """The part of one of `count` equal steps, counted from 0."""
        return self.part(index / count, (index + 1) / count, label)


SILENT = Progress()
