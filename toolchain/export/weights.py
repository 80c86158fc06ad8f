"""The weights of a graph's linears in float64, dequantised as a runtime uses them.

Logits hardly show a fault in one linear among many. So a file of another precision is compared with the fp32 graph weight by
weight, to the rounding of its type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from toolchain.artifacts.onnx_walk import linked, linked_weights, only_reader, stored
from toolchain.errors import ArtifactError

Array = NDArray[Any]
ROUNDING: dict[int, float] = {TensorProto.FLOAT: 0.0, TensorProto.FLOAT16: 2.0**-11, TensorProto.BFLOAT16: 2.0**-8}
"""Half the distance between neighbouring numbers, as a share of the number."""
SMALLEST: dict[int, float] = {TensorProto.FLOAT: 0.0, TensorProto.FLOAT16: 2.0**-24, TensorProto.BFLOAT16: 2.0**-133}
"""The distance of numbers close to 0."""
LINEARS = ("MatMul", "Gemm", "MatMulInteger")
PASSED = ("DequantizeLinear", "Transpose", "Cast")


@dataclass(frozen=True)
class Linear:
    """One linear of a graph.

    Attributes:
        name: of its node.
        kind: element type of the stored weight, as in `onnx.TensorProto`.
        weight: as the runtime sees it, float64; its last row is the bias [in + 1, out], 0 where there is none.
        allowed: by how much rounding may have moved each of them [in + 1, out].
    """

    name: str
    kind: int
    weight: Array
    allowed: Array


def each_linear(model: onnx.ModelProto) -> Iterator[Linear]:
    """Every linear with a stored weight matrix, one at a time: in float64, all of them are many times what they take on disk.

    They come as the outputs need them. How a graph lists nodes that do not depend on each other is no part of what it computes, and
    ONNX Runtime's converters list them anew.

    Raises:
        ArtifactError: the scale of a quantised weight cannot be found.
    """
    with linked_weights(model) as graph:
        for node in _needed(graph):
            if node.op_type in LINEARS and (linear := _linear(node)) is not None:
                yield linear


def largest_error(expected: Iterable[Linear], got: Iterable[Linear]) -> tuple[float, str]:
    """(the largest |ΔW| in units of what rounding allows, the linear where); 1 or less is rounding alone.

    Args:
        expected: linears of the fp32 graph.
        got: those of the other graph, as many.
    """
    worst, where = 0.0, ""
    for ours, theirs in zip(expected, got, strict=True):
        if ours.weight.shape != theirs.weight.shape:
            return float("inf"), f"{theirs.name}, which is {theirs.weight.shape} and was {ours.weight.shape}"
        allowed = theirs.allowed + 1e-6 * np.abs(ours.weight) + 1e-12  # the scales themselves are fp32
        error = float((np.abs(ours.weight - theirs.weight) / allowed).max())
        if not error <= worst:  # also where it is not a number
            worst, where = error, theirs.name
    return worst, where


def largest_difference(expected: onnx.ModelProto, got: onnx.ModelProto) -> tuple[float, str]:
    """(the largest difference of a stored tensor that no linear owns, in units of what rounding allows; its name).

    Tensors are found by their names; one that is missing, and is no quantised bias of a linear, is infinitely far off.
    """
    others = {tensor.name: tensor for tensor in got.graph.initializer}
    graph, worst, where = linked(expected).graph, 0.0, ""
    for tensor in expected.graph.initializer:
        name, other = tensor.name, others.get(tensor.name)
        weight = any(use.idx == 1 and use.node.op_type in LINEARS for use in graph.initializers[name].uses())
        if tensor.data_type != TensorProto.FLOAT or weight or f"{name}_quantized" in others:
            continue
        if other is None or other.data_type not in ROUNDING or other.dims != tensor.dims:
            return float("inf"), name
        ours, theirs = (numpy_helper.to_array(each).astype(np.float64) for each in (tensor, other))
        error = np.abs(ours - theirs) / (_rounding(ours, other.data_type) * (1 + 1e-6) + 1e-300)
        most = float(np.max(error, initial=0.0))
        if not most <= worst:
            worst, where = most, name
    return worst, where


def activation_scales(model: onnx.ModelProto) -> dict[str, float]:
    """Quantised activation → its scale, the same one where it is rounded and where it is read.

    Raises:
        ArtifactError: it is rounded with one scale or zero point and read with another.
    """
    scales = {}
    with linked_weights(model) as graph:
        for node in (each for each in graph if each.op_type == "QuantizeLinear"):
            value, *how = node.inputs
            if value is None or stored(value) is not None:
                continue
            for reader in node.outputs[0].consumers():
                if reader.op_type != "DequantizeLinear" or any(
                    not np.array_equal(_row(a), _row(b)) for a, b in zip(how, reader.inputs[1:], strict=True)
                ):
                    raise ArtifactError(f"{value.name} is rounded with one scale and read with another")
            scales[str(value.name)] = float(_row(how[0])[0])
    return scales


def _needed(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes that the outputs depend on, each after those that it reads, which come in the order of its inputs."""
    waiting = [(value.producer(), False) for value in reversed(graph.outputs)]
    seen: set[ir.Node] = set()
    while waiting:
        node, reads_given = waiting.pop()
        if node is not None and reads_given:
            yield node
        elif node is not None and node not in seen:
            seen.add(node)
            waiting += [(node, True), *((each, False) for each in reversed(node.predecessors()))]


def _linear(node: ir.Node) -> Linear | None:
    """The linear of a node, None if it multiplies two activations."""
    tensor, path = _source(node.inputs[1])
    if tensor is None or len(tensor.shape) != 2:
        return None
    weight, allowed = _values(node, tensor, path)
    if sum(each.op_type == "Transpose" for each in path) % 2 != node.attributes.get_int("transB", 0):
        weight, allowed = weight.T, allowed.T
    bias, free = _bias(node, weight.shape[1])
    return Linear(node.name or "", tensor.dtype, np.vstack([weight, bias]), np.vstack([allowed, free]))


def _source(value: ir.Value | None) -> tuple[ir.TensorProtocol | None, list[ir.Node]]:
    """(the tensor that a value is made of, the nodes from there, the last first); None if it depends on the input."""
    path: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None and node.op_type in PASSED:
        path.append(node)
        value = node.inputs[0]
    return stored(value), path


def _values(node: ir.Node, tensor: ir.TensorProtocol, path: Sequence[ir.Node]) -> tuple[Array, Array]:
    """(a stored tensor's values, what rounding may have moved them by); `path` leads from it to the node."""
    values = tensor.numpy().astype(np.float64)
    return (values, _rounding(values, tensor.dtype)) if tensor.dtype in ROUNDING else _dequantised(node, path, values)


def _rounding(values: Array, kind: int) -> Array:
    return np.maximum(np.abs(values) * ROUNDING[kind], SMALLEST[kind])


def bias_of(node: ir.Node, width: int) -> ir.Value | None:
    """A linear's bias [width]: of the Gemm itself, or what is added to its product soon after; None where there is none."""
    own = node.op_type == "Gemm" and len(node.inputs) > 2
    return node.inputs[2] if own else _added(node, width)


def _bias(node: ir.Node, width: int) -> tuple[Array, Array]:
    """A linear's bias [out] and what rounding allows."""
    tensor, path = _source(bias_of(node, width))
    return (np.zeros(width), np.zeros(width)) if tensor is None else _values(node, tensor, path)


def _added(node: ir.Node, width: int) -> ir.Value | None:
    """A stored vector that is added to a product, looked for through scales, casts and reshapes."""
    for _ in range(6):
        value = node.outputs[0]
        if (reader := only_reader(value)) is None or reader.op_type not in ("Add", "Cast", "Mul", "Reshape"):
            break
        if reader.op_type == "Add":
            return next((each for each in reader.inputs if each is not value and _is_vector(each, width)), None)
        node = reader
    return None


def _is_vector(value: ir.Value | None, width: int) -> bool:
    tensor, _ = _source(value)
    return tensor is not None and tensor.shape == (width,)


def _dequantised(node: ir.Node, path: Sequence[ir.Node], weight: Array) -> tuple[Array, Array]:
    """(the weights times their scales, half a step of each), both as stored."""
    pair = next((each for each in path if each.op_type == "DequantizeLinear"), None)
    if pair is not None:
        scale, axis = _row(pair.inputs[1]), pair.attributes.get_int("axis", 1) if weight.ndim > 1 else 0
        zeros = pair.inputs[2:]
    else:
        scale, axis, zeros = _row(_scale_after(node)), 1, node.inputs[3:]
    zero = _row(zeros[0]) if zeros else np.zeros(1)
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[axis % weight.ndim] = scale.size
    scale = scale.reshape(shape)
    weight = (weight - zero.reshape(shape if zero.size > 1 else [1] * weight.ndim)) * scale
    return weight, np.broadcast_to(np.abs(scale) / 2, weight.shape)


def _scale_after(node: ir.Node) -> ir.Value:
    """The stored scale of MatMulInteger's weight: a factor of what its product is multiplied by."""
    name = node.name
    for _ in range(4):
        if (reader := only_reader(node.outputs[0])) is None:
            break
        if (node := reader).op_type == "Mul":
            for factor in filter(None, node.inputs):
                made_of = producer.inputs if (producer := factor.producer()) is not None else ()
                if (scale := next((each for each in (factor, *made_of) if stored(each) is not None), None)) is not None:
                    return scale
    raise ArtifactError(f"the scale of the weight of {name} cannot be found")


def _row(value: ir.Value | None) -> Array:
    """A stored tensor as one row, float64."""
    if value is None or (tensor := stored(value)) is None:
        raise ArtifactError(f"{value and value.name} is no stored tensor; a scale must not depend on the input")
    return tensor.numpy().astype(np.float64).reshape(-1)
