"""What torch exported in this session, so that it exports no model twice: that is the slow part of a test that needs a file."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
    """One for all that are exported alike: classes, attributes, buffers and weights; None where they hold what has no name."""
    stream = io.BytesIO()
    try:
        _Pickler(stream).dump(things)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes tensors by their values and sets in order; as they are, both are others in every process."""

    def persistent_id(self, thing: Any) -> object:
        if isinstance(thing, torch.Tensor):
            values = np.ascontiguousarray(thing.detach().numpy())
            return type(thing).__name__, str(thing.dtype), tuple(thing.shape), values.tobytes()
        return sorted(map(repr, thing)) if isinstance(thing, set | frozenset) else None
