"""Kinds whose cells take values from sweeps: other cells of the suite, of which the best is found first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from kinds.base import Cell, Kind, NotReady, Table
from toolchain.errors import RecipeError

if TYPE_CHECKING:
    from engine import Bench
    from records import Record
    from suite import Suite


@dataclass(frozen=True)
class SweptCell(Cell):
    """A cell that takes the best of some sweeps, by name."""

    best: tuple[str, ...] = ()


C = TypeVar("C", bound=SweptCell)
G = TypeVar("G", bound=Table)


class Swept(Kind[C, G]):
    """Waits for sweeps and takes what they gave."""

    def best_values(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """The settings of the best try of a sweep."""
        raise NotImplementedError

    def check(self, cell: C, suite: Suite) -> None:
        """Its sweeps must be in the suite."""
        for sweep in cell.best:
            if sweep not in suite.sweeps:
                known = ", ".join(suite.sweeps)
                raise RecipeError(f"{suite.path}: {cell.name} takes the best of {sweep!r}; known: {known}")

    def waits_for(self, cell: C, suite: Suite) -> Sequence[Cell]:
        """The tries of the sweeps that it takes values from."""
        return [each for sweep in cell.best for each in suite.sweeps[sweep]]

    def chosen(self, cell: C, bench: Bench) -> dict[str, Any]:
        """What the sweeps gave that a cell relies on; raises NotReady while a try is missing or out of date."""
        values: dict[str, Any] = {}
        for sweep in cell.best:
            tries = [bench.record(each) for each in bench.suite.sweeps[sweep]]
            if None in tries:
                raise NotReady(f"{cell.name} waits for the sweep {sweep!r}")
            values |= self.best_values([record for record in tries if record is not None])
        return values


def put(raw: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes settings with dotted keys into the tables of a recipe, in place."""
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
