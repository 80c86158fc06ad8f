"""The code of what other packages, or a program, put into a registry: an outcome depends on it as on slimvit's own sources."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType

from toolchain.files import digest_of, sha256

OWN = frozenset({"toolchain", "builtins", *sys.stdlib_module_names} - {"__main__"})
"""Top packages whose code is known by slimvit's sources, or by the version of Python."""


def foreign_code(entries: Iterable[object]) -> list[list[str]]:
    """(package, digest of its sources) of all packages but slimvit that the entries of registries come from, sorted; [] where there is none.

    What a script or a notebook defines is known by its own source alone, so that another line of the script changes nothing.
    """
    places = {place for entry in entries for place in _places(entry)}
    return [list(place) for place in sorted(places)]


def _places(entry: object) -> Iterator[tuple[str, str]]:
    """(package, digest of its sources) of an entry's class and of the functions that it holds."""
    for part in _parts(entry):
        top = part.__module__.partition(".")[0]
        if top == "__main__":
            yield f"{top}.{part.__qualname__}", _source(part)
        elif top not in OWN:
            yield top, _sources(top)


def _parts(entry: object) -> Iterator[type | FunctionType]:
    """The class or function that an entry is, or is an instance of; and of a dataclass those of its fields."""
    if isinstance(entry, functools.partial):
        yield from _parts(entry.func)
    elif isinstance(entry, type | FunctionType):
        yield entry
    else:
        yield type(entry)
        values = (getattr(entry, field.name) for field in fields(entry)) if is_dataclass(entry) else ()
        for value in values:
            if callable(value) or is_dataclass(value):
                yield from _parts(value)


def _source(part: type | FunctionType) -> str:
    """Digest of the lines that define something; of its name where they cannot be read."""
    try:
        return digest_of(inspect.getsource(part))
    except (OSError, TypeError):
        return digest_of(part.__qualname__)


@cache
def _sources(top: str) -> str:
    """Digest of the Python files of an imported package, or of a module's file."""
    module = sys.modules.get(top)
    files = [] if module is None else sorted(_files(module))
    return digest_of([(name, sha256(path)) for name, path in files])


def _files(module: ModuleType) -> Iterator[tuple[str, Path]]:
    """(name, path) of the Python files of a package, or of a module."""
    for folder in map(Path, getattr(module, "__path__", ())):
        yield from ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py"))
    if not hasattr(module, "__path__") and (file := getattr(module, "__file__", None)) and Path(file).is_file():
        yield Path(file).name, Path(file)
