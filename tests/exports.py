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
from onnx import TensorProto, numpy_helper
from torch import nn

from toolchain.export import large
from toolchain.export.large import module_bytes

LARGEST_BYTES = 4 << 20
"""Of the weights of a model whose graph is kept."""
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True)
class Program:
    """As much of torch's `ONNXProgram` as is read here."""

    model_proto: onnx.ModelProto


def once(export: Callable[..., Any], kept: Path) -> Callable[..., Any]:
    """`torch.onnx.export`, which reads a graph from `kept` where any worker of the session has exported just that.

    A graph in which every weight stands as it is, or turned, is also read for the same model with other weights.
    """
    return partial(_once, export, kept)


def _once(export: Callable[..., Any], kept: Path, module: nn.Module, *arguments: object, **options: object) -> Any:
    few = module_bytes(module) <= min(LARGEST_BYTES, large.INLINE_LIMIT_BYTES)
    key = digest(module, arguments, options) if few else None
    if key is None:
        return export(module, *arguments, **options)
    path, shape = kept / f"{key}.onnx", kept / f"{digest(module, arguments, options, weights=False)}.shape.onnx"
    if path.exists():
        return Program(onnx.load(path))
    if shape.exists():
        return Program(_with_weights(onnx.load(shape), module))
    model = export(module, *arguments, **options).model_proto
    kept.mkdir(exist_ok=True)
    _keep(model, path)
    if _has_weights(model, module):
        _keep(model, shape)
    return Program(onnx.load(path))


def _keep(model: onnx.ModelProto, path: Path) -> None:
    half = path.with_suffix(f".{os.getpid()}")
    onnx.save(model, half)
    half.rename(path)


def _has_weights(model: onnx.ModelProto, module: nn.Module) -> bool:
    """Whether each weight is one floating-point initializer and no other is; those that are turned are named after theirs then.

    Weights of equal values might stand for each other, so that there is no telling; such a graph is for these weights alone.
    """
    weights = {name: _values(weight) for name, weight in module.named_parameters()}
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_type not in FLOATS:
            continue
        values = numpy_helper.to_array(tensor)
        if tensor.name in weights:
            found.append(tensor.name if np.array_equal(values, weights[tensor.name]) else "")
            continue
        turned = [name for name, weight in weights.items() if weight.ndim == 2 and np.array_equal(values, weight.T)]
        found.append(turned[0] if len(turned) == 1 else "")
        tensor.doc_string = found[-1]
    return sorted(found) == sorted(weights)


def _with_weights(model: onnx.ModelProto, module: nn.Module) -> onnx.ModelProto:
    """A kept graph with the weights of a module."""
    weights = dict(module.named_parameters())
    for tensor in model.graph.initializer:
        if tensor.data_type in FLOATS:
            weight = _values(weights[tensor.doc_string or tensor.name])
            values = weight.T if tensor.doc_string else weight
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))
    return model


def _values(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().numpy()


def digest(*things: object, weights: bool = True) -> str | None:
    """One for all that are exported alike: code, attributes, buffers and weights; None where they hold what has no name.

    Without `weights`, one for all whose parameters are as large, whatever their values.
    """
    stream = io.BytesIO()
    try:
        _Pickler(stream, weights=weights).dump(things)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes tensors by their values and sets in order, as they are others in every process; and what the code of modules is now.

    Functions that a method calls are left to their names: who patches one of those must export past what is kept.
    """

    def __init__(self, stream: io.BytesIO, *, weights: bool) -> None:
        super().__init__(stream)
        self._weights = weights
        self._numbers: dict[int, int] = {}
        self._alive: list[object] = []

    def persistent_id(self, thing: Any) -> object:
        if isinstance(thing, torch.Tensor):
            told = self._weights or not isinstance(thing, nn.Parameter)
            values = np.ascontiguousarray(thing.detach().numpy()) if told else np.empty(0)
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
