"""ONNX's operators in forms that XNNPACK supports: equal up to rounding, in one delegate instead of sixty.

XNNPACK multiplies batches of matrices of rank 3 alone, takes means of rank 4 over the last two dimensions alone, and has slices,
products and quotients, but neither splits, selections of one row, copies, reciprocals nor sums. What it does not take runs on
ExecuTorch's portable kernels, which are slow, and each such operator ends a delegate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from toolchain.interpreter.operators import OPERATORS, Attributes, Operator, Value


def _standardised(x: Tensor, axis: int, epsilon: float) -> Tensor:
    """What x [..., C] is with mean 0 and variance 1 over the axes from one on, by two means of [rows, 1, 1, C]."""
    flat = x.reshape(math.prod(x.shape[:axis]), 1, 1, math.prod(x.shape[axis:]))
    centred = flat - flat.mean((2, 3), keepdim=True)
    variance = (centred * centred).mean((2, 3), keepdim=True)
    return (centred * torch.rsqrt(variance + epsilon)).reshape(x.shape)


def _layer_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    normed = _standardised(x, attributes.get("axis", -1) % x.ndim, attributes.get("epsilon", 1e-5)) * scale
    return normed if bias is None else normed + bias


def _instance_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    by_channel = (-1,) + (1,) * (x.ndim - 2)
    normed = _standardised(x, 2, attributes.get("epsilon", 1e-5))
    return normed * scale.reshape(by_channel) + bias.reshape(by_channel)


def _mean(attributes: Attributes, x: Tensor, axes: Value = None) -> Tensor:
    """The mean over some axes, as one of [others, 1, 1, these] over the last two dimensions."""
    shape: Tensor = OPERATORS["ReduceMean"](attributes, x.new_empty(x.shape, device="meta"), axes)
    given = attributes.get("axes", ()) if axes is None else np.asarray(axes).reshape(-1)
    over = sorted(int(axis) % x.ndim for axis in given)
    if not over:
        found: Tensor = OPERATORS["ReduceMean"](attributes, x, axes)
        return found
    others = [axis for axis in range(x.ndim) if axis not in over]
    rows, length = (math.prod(x.shape[axis] for axis in part) for part in (others, over))
    return x.permute(*others, *over).reshape(rows, 1, 1, length).mean((2, 3), keepdim=True).reshape(shape.shape)


def _matmul(_: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b; of equal leading dimensions as one batch of matrices, [B, h, N, d] as [B·h, N, d]."""
    if a.ndim < 3 or a.shape[:-2] != b.shape[:-2]:
        return torch.matmul(a, b)
    product = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return product.reshape(*a.shape[:-1], b.shape[-1])


def _slice(
    attributes: Attributes, x: Tensor, starts: Value, ends: Value, axes: Value = None, steps: Value = None
) -> Tensor:
    """Every k-th number of an axis, as rotary positions take them, is a column of [..., rows, k, ...]."""
    if not isinstance(axes, np.ndarray) or not isinstance(steps, np.ndarray):
        sliced: Tensor = OPERATORS["Slice"](attributes, x, starts, ends, axes, steps)
        return sliced
    for bounds in zip(*(np.asarray(each).reshape(-1, 1) for each in (starts, ends, axes, steps)), strict=True):
        start, end, axis, step = (int(each[0]) for each in bounds)
        axis %= x.ndim
        before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        found = range(size)[start:end:step]
        if step > 1 and size % step == 0 and len(found) == size // step:
            rows = x.reshape(*before, size // step, step, *after)
            x = rows.narrow(axis + 1, found.start, 1).reshape(*before, size // step, *after)
        else:
            x = OPERATORS["Slice"](attributes, x, *bounds)
    return x


def _split(attributes: Attributes, x: Tensor, sizes: Value = None) -> Sequence[Tensor]:
    """Slices where the interpreter would split."""
    parts: Sequence[Tensor] = OPERATORS["Split"](attributes, x.new_empty(x.shape, device="meta"), sizes)
    axis, slices, start = attributes.get("axis", 0), [], 0
    for part in parts:
        slices.append(x.narrow(axis, start, part.shape[axis]))
        start += part.shape[axis]
    return slices


def _gather(attributes: Attributes, x: Tensor, indices: Value) -> Tensor:
    """One row that is known is a slice of one."""
    if not isinstance(indices, np.ndarray) or indices.ndim:
        found: Tensor = OPERATORS["Gather"](attributes, x, indices)
        return found
    axis = attributes.get("axis", 0) % x.ndim
    row = x.narrow(axis, int(indices) % x.shape[axis], 1)
    return row.reshape(*x.shape[:axis], *x.shape[axis + 1 :])


def _reshaped(name: str) -> Operator:
    """A reshape in place of an operator that XNNPACK has for some axes alone."""

    def reshape(attributes: Attributes, x: Tensor, axes: Value = None) -> Tensor:
        shape: Tensor = OPERATORS[name](attributes, x.new_empty(x.shape, device="meta"), axes)
        return x.reshape(shape.shape)

    return reshape


def _expand(attributes: Attributes, x: Tensor, shape: Value) -> Tensor:
    """Floats that are repeated are multiplied by ones; what is as large already is left alone."""
    wanted: Tensor = OPERATORS["Expand"](attributes, x.new_empty(x.shape, device="meta"), shape)
    if wanted.shape == x.shape or not x.is_floating_point():
        found: Tensor = x if wanted.shape == x.shape else OPERATORS["Expand"](attributes, x, shape)
        return found
    own = (1,) * (wanted.ndim - x.ndim) + tuple(x.shape)
    repeated = [1 if length == size else size for length, size in zip(own, wanted.shape, strict=True)]
    return x * torch.tensor(np.ones(repeated, np.float32))


def _reciprocal(_: Attributes, x: Tensor) -> Tensor:
    """A quotient."""
    return torch.tensor(1.0) / x


def _sum(attributes: Attributes, x: Tensor, axes: Value = None) -> Tensor:
    """The sum over some axes, by their mean; of integers as it is."""
    if not x.is_floating_point():
        found: Tensor = OPERATORS["ReduceSum"](attributes, x, axes)
        return found
    mean = _mean(attributes, x, axes)
    return mean * (x.numel() / mean.numel())


def _length(attributes: Attributes, x: Tensor, axes: Value = None) -> Tensor:
    return torch.sqrt(_sum(attributes, x * x, axes))


REWRITES: Mapping[str, Operator] = {
    "Expand": _expand,
    "Gather": _gather,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Reciprocal": _reciprocal,
    "ReduceL2": _length,
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshaped("Squeeze"),
    "Unsqueeze": _reshaped("Unsqueeze"),
}
"""What replaces the interpreter's own operators."""
