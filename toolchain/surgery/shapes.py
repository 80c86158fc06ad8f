"""Builds models on the meta device, without memory for weights and without running initialisers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_METHODS = ("add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "sub_", "uniform_", "zero_")
_FILLS = {
    *(getattr(Tensor, name) for name in _METHODS),
    *(getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")),
}
"""Functions that only write values into their first argument."""


class _Unfilled(TorchFunctionMode):
    """Skips functions that would fill meta tensors; they take most of a constructor's time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """In this block, modules are made on the meta device and not initialised."""
    with torch.device("meta"), _Unfilled():
        yield
