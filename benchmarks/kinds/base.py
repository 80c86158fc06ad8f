"""A cell, and what a kind of cells says about its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import ConfigDict

from toolchain.errors import SlimvitError
from toolchain.progress import Progress
from toolchain.settings import Section

if TYPE_CHECKING:
    from engine import Bench
    from records import Record
    from suite import File, Suite


class NotReady(SlimvitError):
    """A cell waits for records of others that are not there yet."""


class Table(Section):
    """A table of a suite's file; lists of TOML stand for tuples."""

    model_config = ConfigDict(strict=False)


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        name: unique in its suite, and the name of its record.
        kind: the name of its kind.
        row: of the page's tables; cells of a row are put together there.
        sweep: what the cell is a try of, or "".
        place: cells with a smaller number are measured first.
    """

    name: str
    kind: str
    row: str = ""
    sweep: str = ""
    place: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What measuring a cell gives: the parts of its record, and the records that are made beside it, by name and kind."""

    definition: dict[str, Any]
    result: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    beside: Mapping[tuple[str, str], Outcome] = field(default_factory=dict)


C = TypeVar("C", bound=Cell)
G = TypeVar("G", bound=Table)


class Kind(Generic[C, G]):
    """What the engine asks about the cells of one kind; `name` and `group`, the table of a suite's file, are its own."""

    name: str
    group: type[G]
    shared = False
    """Whether a record of another suite under the same key stands for a cell."""

    def cells(self, group: G, file: File, path: Path) -> list[C]:
        """The cells of a group; raises RecipeError if it contradicts the rest of its file."""
        raise NotImplementedError

    def check(self, cell: C, suite: Suite) -> None:
        """Raises RecipeError if a cell names what the suite does not have."""

    def waits_for(self, cell: C, suite: Suite) -> Sequence[Cell]:
        """The cells whose records must be there before this one can be measured."""
        return ()

    def unavailable(self, cell: C) -> str:
        """Why this machine cannot measure a cell, or "" if it can."""
        return ""

    def key(self, cell: C, bench: Bench, record: Record | None = None) -> str:
        """Digest of everything that the outcome depends on.

        Args:
            cell: which.
            bench: the suite, and what is recorded of it.
            record: a record of the cell, for what this machine does not know.

        Raises:
            NotReady: it depends on a record that is not there.
        """
        raise NotImplementedError

    def is_current(self, cell: C, record: Record, bench: Bench) -> bool:
        """Whether a record under the right key is still what measuring would give; may make files to find out."""
        return True

    def predict(self, todo: Sequence[C], bench: Bench, rate: float) -> dict[str, float]:
        """Name → seconds, of the cells to do and of what has to be made for them.

        Args:
            todo: cells of this kind.
            bench: the suite, and what is recorded of it.
            rate: multiply-accumulates a second and thread of this machine.
        """
        raise NotImplementedError

    def measure(self, cell: C, bench: Bench, progress: Progress) -> Outcome:
        """Carries a cell out."""
        raise NotImplementedError

    def definition(self, cell: C, other: dict[str, Any]) -> dict[str, Any]:
        """The definition of a record that is taken from another cell, which asks for the same."""
        return other

    def summary(self, record: Record) -> str:
        """A record in a few words."""
        return ""
