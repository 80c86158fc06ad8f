"""What torch exported in this session, so that it exports no model twice: that is the slow part of a test that needs a file."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from toolchain.export import large
from toolchain.export.large import module_bytes

LARGEST_BYTES = 4 << 20
"""Of the weights of a model whose graph is kept."""


@dataclass(frozen=True)
class Program:
    """As much of torch's `ONNXProgram` as is read here."""

    model_proto: onnx.ModelProto


def once(export: Callable[..., Any], kept: Path) -> Callable[..., Any]:
    """`torch.onnx.export`, which reads a graph from `kept` where any worker of the session has exported just that."""
    return partial(_once, export, kept)


def _once(export: Callable[..., Any], kept: Path, module: nn.Module, *arguments: object, **options: object) -> Any:
    few = module_bytes(module) <= min(LARGEST_BYTES, large.INLINE_LIMIT_BYTES)
    key = digest(module, arguments, options) if few else None
    if key is None:
        return export(module, *arguments, **options)
    path = kept / f"{key}.onnx"
    if not path.exists():
        kept.mkdir(exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")
        onnx.save(export(module, *arguments, **options).model_proto, half)
        half.rename(path)
    return Program(onnx.load(path))


def digest(*things: object) -> str | None:
    """One for all that are exported alike: code, attributes, buffers and weights; None where they hold what has no name."""
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump(things)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes tensors by their values and sets in order, as they are others in every process; and what the code of modules is now.

    Functions that a method calls are left to their names: who patches one of those must export past what is kept.
    """

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []

    def persistent_id(self, thing: Any) -> object:
        if isinstance(thing, torch.Tensor):
            values = np.ascontiguousarray(thing.detach().numpy())
            number, _ = self._number(thing, thing.data_ptr())  # which weights are one is part of a graph
            return type(thing).__name__, str(thing.dtype), tuple(thing.shape), values.tobytes(), number
        if isinstance(thing, FunctionType) or (isinstance(thing, type) and issubclass(thing, nn.Module)):
            number, fresh = self._number(thing, id(thing))
            said = _function(thing) if isinstance(thing, FunctionType) else _class(thing)
            return (thing.__module__, thing.__qualname__, said) if fresh else number
        return sorted(map(repr, thing)) if isinstance(thing, set | frozenset) else None

    def _number(self, thing: object, address: int) -> tuple[int, bool]:
        """How many others came before what lies at an address, and whether it is there for the first time."""
        fresh = address not in self._numbers
        self._alive.append(thing)  # so that nothing else comes to lie there
        return self._numbers.setdefault(address, len(self._numbers)), fresh


def _class(thing: type) -> object:
    """The methods of a module and its numbers and strings, with those that it inherits."""
    held = [
        (name, getattr(value, "__func__", getattr(value, "fget", value)))
        for each in thing.__mro__
        if issubclass(each, nn.Module)
        for name, value in vars(each).items()
    ]
    return [(name, value) for name, value in held if isinstance(value, FunctionType | int | float | str)]


def _function(thing: FunctionType) -> object:
    """What a function does, and the values that it holds."""
    captured = [cell.cell_contents for cell in thing.__closure__ or ()]
    return _text(thing.__code__), captured, thing.__defaults__, thing.__kwdefaults__


@cache
def _text(code: CodeType) -> str:
    """The instructions of a function and of those within it, alike in every process."""
    constants = [
        _text(each) if isinstance(each, CodeType) else sorted(map(repr, each)) if isinstance(each, frozenset) else each
        for each in code.co_consts
    ]
    return repr((code.co_code, code.co_names, constants))
