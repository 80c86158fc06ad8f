"""ONNX operators in torch. An operator that is not in the table is refused, so that nothing is guessed.

A value is a tensor, or where it is known from shapes alone a numpy array, so that a graph which computes shapes can be traced.
Semantics are those of ONNX's operator specification, opset 18 to 23, of the default domain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx_ir import DataType
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor
from torch.nn import functional

from toolchain.errors import ArtifactError

Known = NDArray[Any]
"""A value that depends only on the shapes of the inputs."""
Value = Tensor | Known | None
"""None is an optional input that was left out."""
Attributes = Mapping[str, Any]
Operator = Callable[..., Any]
"""(attributes, *inputs) → one output, or a sequence of several."""
AUTO = ("NOTSET", "VALID")
"""`auto_pad` of convolutions that say their padding themselves, or have none."""


def _integers(value: Value, what: str) -> list[int]:
    """A list of integers that must be known before a call."""
    if isinstance(value, np.ndarray):
        return [int(each) for each in value.reshape(-1)]
    raise ArtifactError(f"{what} depend on what the image shows; only those that follow from shapes are understood")


def _elementwise(function: Callable[..., Any]) -> Operator:
    return lambda _, *inputs: function(*inputs)


def _div(_: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def fold(_: Attributes, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return fold


def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=attributes.get("approximate", "none"))


def _softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return x.softmax(attributes.get("axis", -1))


def _layer_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = attributes.get("axis", -1) % x.ndim
    return functional.layer_norm(x, x.shape[axis:], scale, bias, attributes.get("epsilon", 1e-5))


def _rms_norm(attributes: Attributes, x: Tensor, scale: Tensor) -> Tensor:
    axis = attributes.get("axis", -1) % x.ndim
    return functional.rms_norm(x, x.shape[axis:], scale, attributes.get("epsilon", 1e-5))


def _instance_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.group_norm(x, x.shape[1], scale, bias, attributes.get("epsilon", 1e-5))


def _batch_norm(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if attributes.get("training_mode", 0):
        raise ArtifactError("a BatchNormalization in training mode is no inference")
    return functional.batch_norm(x, mean, var, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if attributes.get("transA", 0) else a
    b = b if attributes.get("transB", 0) else b.T
    scaled: Tensor = functional.linear(a, b) * attributes.get("alpha", 1.0)
    return scaled if c is None else scaled + attributes.get("beta", 1.0) * c


def _padded(attributes: Attributes, x: Tensor, what: str, fill: float = 0.0) -> Tensor:
    """An image [N, C, …] with the padding of a convolution or pool around it."""
    if attributes.get("auto_pad", "NOTSET") not in AUTO:
        raise ArtifactError(f"{what} has auto_pad {attributes['auto_pad']}; explicit padding alone is understood")
    pads = [int(each) for each in attributes.get("pads", ())]
    if not any(pads) or attributes.get("auto_pad") == "VALID":
        return x
    return functional.pad(x, _torch_pads(pads), value=fill)


def _torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX's (begin of each axis, …, end of each axis) as torch's (begin, end) from the last axis on."""
    half = len(pads) // 2
    return [pads[axis + side * half] for axis in reversed(range(half)) for side in (0, 1)]


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = weight.ndim - 2
    if axes not in (1, 2):
        raise ArtifactError(f"a Conv over {axes} axes is not understood")
    function = functional.conv1d if axes == 1 else functional.conv2d
    one = [1] * axes
    strides, dilations = (list(attributes.get(name, one)) for name in ("strides", "dilations"))
    padded = _padded(attributes, x, "a Conv")
    return function(padded, weight, bias, strides, 0, dilations, attributes.get("group", 1))


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    if attributes.get("ceil_mode", 0):
        raise ArtifactError("a MaxPool with ceil_mode is not understood")
    kernel = list(attributes["kernel_shape"])
    strides, dilations = (list(attributes.get(name, [1] * len(kernel))) for name in ("strides", "dilations"))
    return functional.max_pool2d(_padded(attributes, x, "a MaxPool", -math.inf), kernel, strides, 0, dilations)


def _reduced(function: Callable[..., Tensor]) -> Operator:
    """A reduction, whose axes are an input since opset 18; without any, over all or over none."""

    def reduce(attributes: Attributes, x: Tensor, axes: Value = None) -> Tensor:
        given = attributes.get("axes", []) if axes is None else _integers(axes, "the axes of a reduction")
        if not len(given):
            if attributes.get("noop_with_empty_axes", 0):
                return x
            given = range(x.ndim)
        return function(x, dim=tuple(int(axis) for axis in given), keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _norm(order: int) -> Callable[..., Tensor]:
    return lambda x, dim, keepdim: torch.linalg.vector_norm(x, order, dim, keepdim)


def _reshape(attributes: Attributes, x: Tensor, shape: Value) -> Tensor:
    wanted = _integers(shape, "the shape of a Reshape")
    if not attributes.get("allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(list(attributes.get("perm", reversed(range(x.ndim)))))


def _concat(attributes: Attributes, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, attributes["axis"])


def _split(attributes: Attributes, x: Tensor, sizes: Value = None) -> Sequence[Tensor]:
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return torch.split(x, _integers(sizes, "the sizes of a Split"), axis)
    parts = attributes["outputs"] if "num_outputs" not in attributes else attributes["num_outputs"]
    return torch.split(x, math.ceil(x.shape[axis] / parts), axis)


def _slice(_: Attributes, x: Tensor, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Tensor:
    first, last = (_integers(each, "the bounds of a Slice") for each in (starts, ends))
    where = range(len(first)) if axes is None else _integers(axes, "the axes of a Slice")
    strides = [1] * len(first) if steps is None else _integers(steps, "the steps of a Slice")
    for start, end, axis, step in zip(first, last, where, strides, strict=True):
        positions = range(x.shape[axis])[slice(start, None if step < 0 and end < -x.shape[axis] else end, step)]
        if step > 0:
            x = x.movedim(axis, 0)[positions.start : positions.stop : step].movedim(0, axis)
        else:
            x = x.index_select(axis, torch.tensor(positions, device=x.device))
    return x


def _gather(attributes: Attributes, x: Tensor, indices: Value) -> Tensor:
    """Single indices select; an array of them is looked up row by row. A single one that is known is no lookup for converters."""
    axis = attributes.get("axis", 0) % x.ndim
    if isinstance(indices, np.ndarray):
        if indices.ndim == 0:
            return x.select(axis, int(indices))
        indices = torch.tensor(indices % x.shape[axis], device=x.device)
    elif indices is not None:
        indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    else:
        raise ArtifactError("a Gather without indices")
    rows = x.index_select(axis, indices.reshape(-1))
    return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _unsqueeze(_: Attributes, x: Tensor, axes: Value) -> Tensor:
    given = _integers(axes, "the axes of an Unsqueeze")
    rank = x.ndim + len(given)
    for axis in sorted(axis % rank for axis in given):
        x = x.unsqueeze(axis)
    return x


def _squeeze(_: Attributes, x: Tensor, axes: Value = None) -> Tensor:
    given = [axis for axis, size in enumerate(x.shape) if size == 1] if axes is None else _integers(axes, "axes")
    for axis in sorted((axis % x.ndim for axis in given), reverse=True):
        if x.shape[axis] != 1:
            raise ArtifactError(f"a Squeeze of an axis of {x.shape[axis]}")
        x = x.squeeze(axis)
    return x


def _expand(_: Attributes, x: Tensor, shape: Value) -> Tensor:
    wanted = _integers(shape, "the shape of an Expand")
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(wanted)))


def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    return x.to(to_torch_dtype(DataType(attributes["to"])))


def _number(value: Value) -> Any:
    """A single number that is known as Python's own, which converters want; any other value as a tensor."""
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim:
        return torch.tensor(value)
    number = value.item()
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _pow(_: Attributes, x: Tensor, exponent: Value) -> Tensor:
    return torch.pow(x, _number(exponent))


def _clip(_: Attributes, x: Tensor, low: Value = None, high: Value = None) -> Tensor:
    raised = x if low is None else x.clamp(min=_number(low))
    return raised if high is None else raised.clamp(max=_number(high))


def _pad(attributes: Attributes, x: Tensor, pads: Value, value: Value = None, axes: Value = None) -> Tensor:
    mode, given = attributes.get("mode", "constant"), _integers(pads, "the sizes of a Pad")
    if mode != "constant" or isinstance(value, Tensor):
        raise ArtifactError(f"a Pad of mode {mode} by what is computed is not understood; only one by a constant is")
    if axes is not None:
        where = [axis % x.ndim for axis in _integers(axes, "the axes of a Pad")]
        whole = [0] * (2 * x.ndim)
        for index, axis in enumerate(where):
            whole[axis], whole[axis + x.ndim] = given[index], given[index + len(where)]
        given = whole
    return functional.pad(x, _torch_pads(given), value=0.0 if value is None else float(value))


def _shape(attributes: Attributes, x: Tensor) -> Known:
    return np.asarray([*x.shape][attributes.get("start", 0) : attributes.get("end", None)], np.int64)


def _from_shapes(_: Attributes, *__: Tensor) -> Tensor:
    raise ArtifactError("its size depends on what the image shows; only those that follow from shapes are understood")


def _tile(_: Attributes, x: Tensor, repeats: Value) -> Tensor:
    return x.repeat(_integers(repeats, "the repeats of a Tile"))


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Identity": lambda x: x,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": torch.where,
}
"""Operators without attributes that are functions of torch."""
OPERATORS: dict[str, Operator] = {
    **{name: _elementwise(function) for name, function in ELEMENTWISE.items()},
    **dict.fromkeys(("ConstantOfShape", "Range", "Size"), _from_shapes),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Div": _div,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda _, x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "Max": _folded(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _folded(torch.minimum),
    "Pad": _pad,
    "Pow": _pow,
    "RMSNormalization": _rms_norm,
    "ReduceL1": _reduced(_norm(1)),
    "ReduceL2": _reduced(_norm(2)),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": lambda _, x: functional.softplus(x),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sum": _folded(torch.add),
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Gather": (1,),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Pad": (1, 2, 3),
    "Pow": (1,),
    "Clip": (1, 2),
    "Tile": (1,),
    **{name: (1,) for name in OPERATORS if name.startswith("Reduce")},
}
"""Operator → the positions of its inputs that must be known before a call, such as shapes."""
