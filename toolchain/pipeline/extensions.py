"""The code of what other packages, or a program, put into a registry: an outcome depends on it as on slimvit's own sources."""

from __future__ import annotations

import hashlib
import inspect
import re
import secrets
import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import requires, version
from pathlib import Path
from types import CellType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch

from toolchain.files import digest_of, sha256

OWN = frozenset({"toolchain", "builtins", "torch", "timm", *sys.stdlib_module_names})
"""Top packages whose code is known by slimvit's sources, by versions in the keys of stages, or by that of Python."""
DEPENDENCIES = frozenset(
    re.split(r"[^\w-]", each)[0].replace("-", "_") for each in requires("slimvit") or () if "extra" not in each
)
"""Top packages that slimvit is installed with, each known by its version."""
UNREADABLE = secrets.token_hex(16)
"""Stands for what cannot be read: new in every process, so that nothing is reused rather than something that changed."""


def foreign_code(entries: Iterable[object]) -> list[Any]:
    """(packages with the digests of their sources, values beside them) of each entry of registries that is not slimvit's own, sorted.

    What a script or a notebook defines is known by its own source alone, so that another line of the script changes nothing.
    """
    readings = [_Reading(entry) for entry in entries]
    return sorted([sorted(each.code), each.values] for each in readings if each.code)


class _Reading:
    """What an entry holds: [package, digest] of code that is not slimvit's, and all values and names in order."""

    def __init__(self, entry: object) -> None:
        self.code, self.values, self._seen = list[list[str]](), list[str](), dict[int, object]()
        self._read(entry)

    def _read(self, value: Any) -> None:
        if value is None or type(value) in (bool, int, float, complex, str):
            self.values.append(repr(value))
        elif type(value) is bytes:
            self.values.append(hashlib.sha256(value).hexdigest())
        elif id(value) in self._seen:
            self.values.append(f"again {list(self._seen).index(id(value))}")
        else:
            self._seen[id(value)] = value
            is_code = isinstance(value, ModuleType) or hasattr(value, "__qualname__")
            is_own = is_code and self._define(value)
            parts = [] if is_own and isinstance(value, type) else _parts(value, is_code=is_code)
            self.values.append(f"{len(parts)} parts")
            for part in parts if is_code else [type(value), *parts]:
                self._read(part)

    def _define(self, code: Any) -> bool:
        """Whether a module, class or function is slimvit's own; takes its name down, and its source where it is not."""
        named = code.__globals__ if isinstance(code, FunctionType) else {"__name__": getattr(code, "__module__", None)}
        home = code.__name__ if isinstance(code, ModuleType) else str(named.get("__name__"))
        name, top = f"{home}.{getattr(code, '__qualname__', '')}", home.partition(".")[0]
        self.values.append(name)
        if top not in OWN:
            self.code.append([name, _source(code)] if top == "__main__" else [top, _sources(top)])
        return top in OWN


def _parts(value: Any, *, is_code: bool) -> list[Any]:
    """What a value consists of, as far as it can be read; of an instance what pickle would write."""
    if isinstance(value, type | ModuleType):
        return [*getattr(value, "__bases__", ())]
    if isinstance(value, FunctionType):
        closure = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [value.__defaults__, value.__kwdefaults__, vars(value), *closure]
    if is_code:
        return [getattr(value, key, None) for key in ("__func__", "__self__", "__wrapped__")]
    if type(value) in (dict, MappingProxyType):
        return [*value.items()]
    if type(value) in (list, tuple):
        return [*value]
    if type(value) in (set, frozenset):
        return sorted(value, key=repr)
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    try:
        if isinstance(value, torch.Tensor):  # pickle writes other bytes each time
            content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
            return [str(value.dtype), [*value.shape], content]
        pickled = value.__reduce_ex__(4)
    except Exception:  # noqa: BLE001 - a class of others fails in its own ways
        return [UNREADABLE]
    return [*pickled] if isinstance(pickled, tuple) else [pickled]


def _source(part: Any) -> str:
    """Digest of the lines that define something."""
    try:
        return digest_of(inspect.getsource(getattr(part, "__code__", part)))
    except (OSError, TypeError):
        return UNREADABLE


@cache
def _sources(top: str) -> str:
    """Digest of the files of a package's modules that are imported; the version of a dependency."""
    if top in DEPENDENCIES:
        return version(top)
    modules = [(name, sys.modules[name]) for name in sorted(sys.modules) if name.partition(".")[0] == top]
    files = [(name, Path(file)) for name, module in modules if (file := getattr(module, "__file__", None))]
    whole = files and all(path.is_file() for _, path in files)
    return digest_of([(name, sha256(path)) for name, path in files]) if whole else UNREADABLE
