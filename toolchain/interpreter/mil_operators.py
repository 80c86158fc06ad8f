"""Core ML's MIL operators in torch. An operator that is not in the table is refused, so that nothing is guessed.

Arguments have MIL's names: one that a function here does not have is refused as well. Floats come as fp32, whatever the program
holds them in; constants that are no floats come as numpy arrays, single ones as Python's. Semantics are those of opset iOS18.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from toolchain.errors import ArtifactError

Integers = NDArray[np.integer[Any]]
Value = Tensor | Integers | float
Operator = Callable[..., Any]
"""(arguments by their names) → one output, or a sequence of several."""
TYPES = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
"""What a `cast` casts to; the program's declaration rounds to fp16."""


def _tensor(value: Any) -> Tensor:
    """A value as a tensor."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.tensor(value)


def _list(value: Any) -> list[int]:
    """Integers that must be known before a call."""
    if isinstance(value, np.ndarray):
        return [int(each) for each in value.reshape(-1)]
    if isinstance(value, (list, tuple)):
        return [int(each) for each in value]
    raise ArtifactError("shapes and axes that are computed are not understood; only constant ones are")


def _axes(value: Any, rank: int) -> list[int]:
    """Axes counted from the front; all where none are given."""
    return [*range(rank)] if value is None else [axis % rank for axis in _list(value)]


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda x: function(_tensor(x))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda x, y: function(_tensor(x), _tensor(y))


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def reduce(x: Tensor, axes: Integers | None = None, keep_dims: bool = False) -> Tensor:
        return function(x, _axes(axes, x.ndim), keep_dims)

    return reduce


def _cast(x: Any, dtype: str) -> Tensor:
    if dtype not in TYPES:
        raise ArtifactError(f"a cast to {dtype} is not understood; those to {', '.join(TYPES)} are")
    return _tensor(x).to(TYPES[dtype])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


def _matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Integers | None = None,
    pad_type: str = "valid",
    pad: Integers | None = None,
    dilations: Integers | None = None,
    groups: int = 1,
) -> Tensor:
    """Of images [B, C, H, W]; `pad` is before and after each of height and width."""
    if x.ndim != 4:
        raise ArtifactError(f"a convolution over {x.ndim - 2} axes is not understood; one over 2 is")
    x = functional.pad(x, _pads(pad_type, pad))
    stride, dilation = (_pair(strides), _pair(dilations))
    return functional.conv2d(x, weight, bias, stride, 0, dilation, groups)


def _pair(value: Integers | None) -> tuple[int, int]:
    first, second = [1, 1] if value is None else _list(value)
    return first, second


def _pads(pad_type: str, pad: Integers | None) -> list[int]:
    """MIL's padding of height and width as torch has it: that of the width first."""
    if pad_type == "valid":
        return [0, 0, 0, 0]
    if pad_type != "custom" or pad is None:
        raise ArtifactError(f"padding {pad_type!r} is not understood; valid and custom are")
    top, bottom, left, right = _list(pad)
    return [left, right, top, bottom]


def _max_pool(
    x: Tensor,
    kernel_sizes: Integers,
    strides: Integers | None = None,
    pad_type: str = "valid",
    pad: Integers | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    if ceil_mode or x.ndim != 4:
        raise ArtifactError("a max pool that rounds up, or is not over images, is not understood")
    padded = functional.pad(x, _pads(pad_type, pad), value=-torch.inf)
    return functional.max_pool2d(padded, _pair(kernel_sizes), _pair(strides))


def _layer_norm(
    x: Tensor,
    axes: Integers,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    where = _axes(axes, x.ndim)
    if where != [*range(where[0], x.ndim)]:
        raise ArtifactError(f"a layer_norm over axes {where} of {x.ndim} is not understood; one over the last is")
    return functional.layer_norm(x, x.shape[where[0] :], gamma, beta, epsilon)


def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return functional.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


def _instance_norm(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5) -> Tensor:
    return functional.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)


def _l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three axes, as the specification has it."""
    return x * torch.rsqrt(x.square().sum((-3, -2, -1), keepdim=True) + epsilon)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode not in ("EXACT", "TANH_APPROXIMATION"):
        raise ArtifactError(f"a gelu of mode {mode} is not understood")
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


def _softmax(x: Tensor, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def _clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


def _with_epsilon(function: Callable[[Tensor], Tensor]) -> Operator:
    """A function whose argument is kept away from 0."""
    return lambda x, epsilon=0.0: function(x + epsilon)


def _reshape(x: Tensor, shape: Integers) -> Tensor:
    """A size of 0 is that of the input, one of -1 what is left."""
    wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(_list(shape))]
    return _tensor(x).reshape(wanted)


def _transpose(x: Tensor, perm: Integers) -> Tensor:
    return x.permute(_list(perm))


def _concat(values: Sequence[Any], axis: int, interleave: bool = False) -> Tensor:
    if interleave:
        raise ArtifactError("a concat that interleaves is not understood")
    return torch.cat([_tensor(each) for each in values], axis)


def _stack(values: Sequence[Any], axis: int) -> Tensor:
    return torch.stack([_tensor(each) for each in values], axis)


def _split(
    x: Tensor, axis: int, split_sizes: Integers | None = None, num_splits: int | None = None
) -> Sequence[Tensor]:
    if split_sizes is not None:
        return torch.split(x, _list(split_sizes), axis)
    if num_splits is None or x.shape[axis] % num_splits:
        raise ArtifactError(f"a split of {x.shape[axis]} into {num_splits} equal parts is not understood")
    return torch.split(x, x.shape[axis] // num_splits, axis)


def _slice_by_index(
    x: Tensor,
    begin: Integers,
    end: Integers,
    stride: Integers | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Tensor:
    """Axis by axis from `begin` to `end`; where a mask is set the bound is the axis's own, or the axis is dropped."""
    x, rank = _tensor(x), _tensor(x).ndim
    first, last = _list(begin), _list(end)
    steps = [1] * rank if stride is None else _list(stride)
    free, open_, dropped = (
        [False] * rank if mask is None else [*mask] for mask in (begin_mask, end_mask, squeeze_mask)
    )
    for axis in range(rank):
        if dropped[axis]:
            positions = range(x.shape[axis])[first[axis] :][:1]
        else:
            bounds = slice(None if free[axis] else first[axis], None if open_[axis] else last[axis], steps[axis])
            positions = range(x.shape[axis])[bounds]
        if positions != range(x.shape[axis]):
            x = x.index_select(axis, torch.tensor([*positions], dtype=torch.int64))
    for axis in reversed(range(rank)):
        x = x.squeeze(axis) if dropped[axis] else x
    return x


def _slice_by_size(x: Tensor, begin: Integers, size: Integers) -> Tensor:
    for axis, (start, count) in enumerate(zip(_list(begin), _list(size), strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def _gather(x: Value, indices: Value, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    """Single indices select; an array of them is looked up row by row. Out of range is an error, asked for or not."""
    if batch_dims:
        raise ArtifactError("a gather with batches is not understood")
    del validate_indices
    table, where = _tensor(x), _tensor(indices).long()
    axis %= table.ndim
    where = torch.where(where < 0, where + table.shape[axis], where)
    rows = table.index_select(axis, where.reshape(-1))
    return rows.reshape(*table.shape[:axis], *where.shape, *table.shape[axis + 1 :])


def _gather_along_axis(x: Value, indices: Value, axis: int = 0, validate_indices: bool = False) -> Tensor:
    del validate_indices
    table, where = _tensor(x), _tensor(indices).long()
    return table.gather(axis, torch.where(where < 0, where + table.shape[axis], where))


def _expand_dims(x: Tensor, axes: Integers) -> Tensor:
    x, where = _tensor(x), _list(axes)
    rank = x.ndim + len(where)
    for axis in sorted(axis % rank for axis in where):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Tensor, axes: Integers | None = None) -> Tensor:
    where = [axis for axis, size in enumerate(x.shape) if size == 1] if axes is None else _axes(axes, x.ndim)
    for axis in sorted(where, reverse=True):
        if x.shape[axis] != 1:
            raise ArtifactError(f"a squeeze of an axis of {x.shape[axis]}")
        x = x.squeeze(axis)
    return x


def _tile(x: Tensor, reps: Integers) -> Tensor:
    return _tensor(x).repeat(_list(reps))


def _pad(x: Tensor, pad: Integers, mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """`pad` is before and after each of the last axes, in their order."""
    if mode != "constant":
        raise ArtifactError(f"a pad of mode {mode} is not understood; only one by a constant is")
    given = _list(pad)
    pairs = [given[index : index + 2] for index in range(0, len(given), 2)]
    return functional.pad(x, [each for pair in reversed(pairs) for each in pair], value=float(constant_val))


def _shift_scale(data: Integers, scale: Tensor, offset: Any = None) -> Tensor:
    """(data − offset) · scale, a scale for each block of the data: its shape divides the data's."""
    codes = torch.from_numpy(data).float()
    if offset is not None:
        codes = codes - _blocks(_tensor(offset).float(), codes.shape)
    return codes * _blocks(scale, codes.shape)


def _blocks(values: Tensor, shape: Sequence[int]) -> Tensor:
    """One value for each block, repeated over it."""
    if values.ndim != len(shape):
        raise ArtifactError(f"scales of shape {list(values.shape)} for data of shape {list(shape)} are not understood")
    for axis, size in enumerate(shape):
        values = values.repeat_interleave(size // values.shape[axis], axis)
    return values


def _divided(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() or y.is_floating_point() else torch.div(x, y, rounding_mode="floor")


def _norm(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keep)
    return norm


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mul": torch.mul,
    "pow": torch.pow,
    "real_div": _divided,
    "sub": torch.sub,
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "identity": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "sin": torch.sin,
    "softplus": functional.softplus,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}
REDUCED: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_l2_norm": _norm,
    "reduce_max": lambda x, axes, keep: x.amax(axes, keep),
    "reduce_mean": lambda x, axes, keep: x.mean(axes, keep),
    "reduce_min": lambda x, axes, keep: x.amin(axes, keep),
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keep),
    "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
}
OPERATORS: dict[str, Operator] = {
    **{name: _binary(function) for name, function in BINARY.items()},
    **{name: _unary(function) for name, function in UNARY.items()},
    **{name: _reduced(function) for name, function in REDUCED.items()},
    "batch_norm": _batch_norm,
    "cast": _cast,
    "clip": _clip,
    "concat": _concat,
    "constexpr_blockwise_shift_scale": _shift_scale,
    "conv": _conv,
    "expand_dims": _expand_dims,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gelu": _gelu,
    "instance_norm": _instance_norm,
    "inverse": _with_epsilon(torch.reciprocal),
    "l2_norm": _l2_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "log": _with_epsilon(torch.log),
    "matmul": _matmul,
    "max_pool": _max_pool,
    "pad": _pad,
    "reshape": _reshape,
    "rsqrt": _with_epsilon(torch.rsqrt),
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "softmax": _softmax,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}
