"""The weights of a graph's linears as a runtime multiplies by them: whatever their type, with their scales applied.

Logits tell little of one linear among many; its weights tell all. A file of another precision is therefore held against
the fp32 graph weight by weight, to the rounding of its type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

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


def linears(model: onnx.ModelProto) -> list[Linear]:
    """Every linear with a stored weight matrix, in the order of the graph; raises as `each_linear`."""
    return list(each_linear(model))


def each_linear(model: onnx.ModelProto) -> Iterator[Linear]:
    """The same one at a time: in float64, all weights of a model are many times what it takes on disk.

    Raises:
        ArtifactError: the scale of a quantised weight cannot be found.
    """
    graph = _Graph(model)
    for node in model.graph.node:
        if node.op_type in LINEARS and (linear := graph.linear(node)) is not None:
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
    stored = {tensor.name: tensor for tensor in got.graph.initializer}
    weights = {node.input[1] for node in expected.graph.node if node.op_type in LINEARS}
    worst, where = 0.0, ""
    for tensor in expected.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.name in weights or f"{tensor.name}_quantized" in stored:
            continue
        ours, other = numpy_helper.to_array(tensor).astype(np.float64), stored.get(tensor.name)
        if other is None or other.data_type not in ROUNDING or list(other.dims) != list(tensor.dims):
            return float("inf"), tensor.name
        allowed = np.maximum(np.abs(ours) * ROUNDING[other.data_type], SMALLEST[other.data_type])
        error = np.abs(ours - numpy_helper.to_array(other).astype(np.float64)) / (allowed * (1 + 1e-6) + 1e-300)
        most = float(np.max(error, initial=0.0))
        if not most <= worst:
            worst, where = most, tensor.name
    return worst, where


def activation_scales(model: onnx.ModelProto) -> dict[str, float]:
    """Quantised activation → its scale, the same one where it is rounded and where it is read.

    Raises:
        ArtifactError: it is rounded with one scale or zero point and read with another.
    """
    graph = _Graph(model)
    found = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in graph.stored:
            continue
        for reader in graph.readers.get(node.output[0], []):
            if reader.op_type != "DequantizeLinear" or any(
                not np.array_equal(graph.array(a), graph.array(b))
                for a, b in zip(node.input[1:], reader.input[1:], strict=True)
            ):
                raise ArtifactError(f"{node.input[0]} is rounded with one scale and read with another")
        found[node.input[0]] = float(graph.array(node.input[1])[0])
    return found


class _Graph:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def linear(self, node: onnx.NodeProto) -> Linear | None:
        """The linear of a node, None if it multiplies two activations."""
        path, name = [], node.input[1]
        while name in self.producers and self.producers[name].op_type in PASSED:
            path.append(self.producers[name])
            name = path[-1].input[0]
        tensor = self.stored.get(name)
        if tensor is None or len(tensor.dims) != 2:
            return None
        weight, allowed = self._values(node, tensor, path)
        if sum(each.op_type == "Transpose" for each in path) % 2 != bool(_attribute(node, "transB")):
            weight, allowed = weight.T, allowed.T
        bias, free = self._bias(node, weight.shape[1])
        return Linear(node.name, tensor.data_type, np.vstack([weight, bias]), np.vstack([allowed, free]))

    def _values(
        self, node: onnx.NodeProto, tensor: onnx.TensorProto, path: Sequence[onnx.NodeProto]
    ) -> tuple[Array, Array]:
        """(a stored tensor's values, what rounding may have moved them by); `path` leads from it to the node."""
        values = numpy_helper.to_array(tensor).astype(np.float64)
        if tensor.data_type in ROUNDING:
            return values, np.maximum(np.abs(values) * ROUNDING[tensor.data_type], SMALLEST[tensor.data_type])
        return self._dequantised(node, path, values)

    def _bias(self, node: onnx.NodeProto, width: int) -> tuple[Array, Array]:
        """A linear's bias [out] and what rounding allows: of the Gemm itself, or what is added to its product soon after."""
        name = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else self._added(node, width)
        path = []
        while name in self.producers and self.producers[name].op_type in PASSED:
            path.append(self.producers[name])
            name = path[-1].input[0]
        if name not in self.stored:
            return np.zeros(width), np.zeros(width)
        return self._values(node, self.stored[name], path)

    def _added(self, node: onnx.NodeProto, width: int) -> str:
        """The name of a stored vector that is added to a product, looked for through scales, casts and reshapes."""
        name = node.output[0]
        for _ in range(6):
            readers = self.readers.get(name, [])
            if len(readers) != 1:
                break
            if readers[0].op_type == "Add":
                return next((x for x in readers[0].input if x != name and self._is_vector(x, width)), "")
            if readers[0].op_type not in ("Cast", "Mul", "Reshape"):
                break
            name = readers[0].output[0]
        return ""

    def _is_vector(self, name: str, width: int) -> bool:
        while name in self.producers and self.producers[name].op_type in PASSED:
            name = self.producers[name].input[0]
        return name in self.stored and tuple(self.stored[name].dims) == (width,)

    def _dequantised(self, node: onnx.NodeProto, path: Sequence[onnx.NodeProto], weight: Array) -> tuple[Array, Array]:
        """(the weights times their scales, half a step of each), both as stored."""
        pair = next((each for each in path if each.op_type == "DequantizeLinear"), None)
        if pair is not None:
            scale, axis = self.array(pair.input[1]), _attribute(pair, "axis", 1) if weight.ndim > 1 else 0
            zero = self.array(pair.input[2]) if len(pair.input) > 2 else np.zeros(1)
        else:
            scale, axis = self.array(self._scale_after(node)), 1
            zero = self.array(node.input[3]) if len(node.input) > 3 else np.zeros(1)
        shape = [1] * weight.ndim
        if scale.size > 1:
            shape[axis % weight.ndim] = scale.size
        scale = scale.reshape(shape)
        weight = (weight - zero.reshape(shape if zero.size > 1 else [1] * weight.ndim)) * scale
        return weight, np.broadcast_to(np.abs(scale) / 2, weight.shape)

    def _scale_after(self, node: onnx.NodeProto) -> str:
        """The stored scale of MatMulInteger's weight: a factor of what its product is multiplied by."""
        name = node.output[0]
        for _ in range(4):
            (reader,) = self.readers.get(name, [None])
            if reader is None:
                break
            if reader.op_type == "Mul":
                for factor in reader.input:
                    for source in (factor, *(self.producers[factor].input if factor in self.producers else ())):
                        if source in self.stored:
                            return str(source)
            name = reader.output[0]
        raise ArtifactError(f"the scale of the weight of {node.name} cannot be found")

    def array(self, name: str) -> Array:
        """A stored tensor as one row, float64."""
        if name not in self.stored:
            raise ArtifactError(f"{name} is no stored tensor; a scale must not depend on the input")
        found: Array = numpy_helper.to_array(self.stored[name]).astype(np.float64).reshape(-1)
        return found


def _attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
