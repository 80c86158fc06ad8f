"""Registries of everything that a recipe or a command can name; other packages can add entries.

An entry has a `name`. Built-in entries are imported when they are asked for, so that a process that times one runtime
loads no other. Another installed package adds its own through an entry point of the table's group, a program by `add`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar, cast

from toolchain.errors import RecipeError


class Named(Protocol):
    """The protocol of an entry."""

    @property
    def name(self) -> str:
        """Its name in recipes and commands."""
        ...


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T]):
    """Entries of one kind by name, in the order in which they were declared.

    Args:
        what: one entry, in words for messages: "target".
        group: the group of entry points that other packages declare theirs in: "slimvit.targets".
        built_in: name → "module:attribute" of an entry of slimvit's own, or the entry itself.
    """

    def __init__(self, what: str, group: str, built_in: Mapping[str, str | T]) -> None:
        self.what, self.group = what, group
        self._find: dict[str, Callable[[], T]] = {}
        self._found: dict[str, T] = {}
        self._from_packages = False
        for name, place in built_in.items():
            if isinstance(place, str):
                self._find[name] = _imported(place)
            else:
                self.add(place)

    def add(self, entry: T) -> T:
        """Puts an entry into the table, in place of one of the same name; returns it, so it can stand above a class."""
        self._find[entry.name] = lambda: entry
        self._found[entry.name] = entry
        return entry

    def discard(self, name: str) -> None:
        """Takes an entry out of the table, if it is there."""
        self._find.pop(name, None)
        self._found.pop(name, None)

    def require(self, name: str) -> T:
        """The entry of a name; raises RecipeError with the nearest name if there is none."""
        if name in self:
            return self[name]
        near = difflib.get_close_matches(name, self, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self)}"
        raise RecipeError(f"unknown {self.what} {name!r}; {hint}")

    def __getitem__(self, name: str) -> T:
        self._read_packages()
        if name not in self._found:
            self._found[name] = self._find[name]()
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        self._read_packages()
        return name in self._find

    def __iter__(self) -> Iterator[str]:
        self._read_packages()
        return iter(tuple(self._find))

    def __len__(self) -> int:
        self._read_packages()
        return len(self._find)

    def _read_packages(self) -> None:
        """Takes in what installed packages declare, once; an entry of slimvit's own name is never replaced by one of theirs."""
        if self._from_packages:
            return
        self._from_packages = True
        for point in entry_points(group=self.group):
            self._find.setdefault(point.name, partial(self._loaded, point))

    def _loaded(self, point: EntryPoint) -> T:
        """What an entry point leads to; raises RecipeError if the package is broken."""
        where = f"the {self.what} {point.name!r} cannot be loaded from {point.value}"
        try:
            entry = cast("T", point.load())
        except Exception as error:  # a package fails in its own ways
            raise RecipeError(f"{where}: {type(error).__name__}: {error}. Mend or remove that package.") from error
        if entry.name != point.name:
            raise RecipeError(f"{where}: it calls itself {entry.name!r}. Give both one name.")
        return entry


def _imported(place: str) -> Callable[[], Any]:
    module, _, attribute = place.partition(":")
    return lambda: getattr(importlib.import_module(module), attribute)
