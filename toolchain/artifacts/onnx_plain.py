"""An ONNX graph of any precision as the fp32 graph of the same numbers: what converters to other runtimes start from.

Weights are exactly those of the file, written in fp32; what the file does to activations, to round them, is left to the runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from toolchain.errors import ArtifactError

Array = NDArray[Any]
Copied = TypeVar("Copied", bound=Message)
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
WEIGHTS = {"MatMul": 2, "Gemm": 2, "Conv": 4}
"""Operator → how many dimensions the weight has that it multiplies by."""
MOVES = ("Transpose", "Identity", "Cast")
"""Operators through which a weight is looked for."""


@dataclass(frozen=True)
class Codes:
    """An int8 weight as a file stores it; the weight is `codes * scales`.

    Attributes:
        codes: int8 [in, out].
        scales: float32 [out].
    """

    codes: Array
    scales: Array

    @property
    def weight(self) -> Array:
        """float32 [in, out]."""
        product: Array = self.codes.astype(np.float32) * self.scales
        return product


@dataclass(frozen=True)
class Plain:
    """A graph without any type but fp32.

    Attributes:
        model: the graph, with its weights; inputs and outputs have the names of the file's.
        codes: initializer of an int8 linear in it → what the file stores in its place.
        halves: initializers that the file stores in fp16 or bf16.
    """

    model: onnx.ModelProto
    codes: dict[str, Codes]
    halves: frozenset[str]


def plain(model: onnx.ModelProto) -> Plain:
    """The fp32 graph of a file in fp32, fp16, bf16 or with dynamically quantised linears.

    Args:
        model: the file, with its weights in memory.

    Raises:
        ArtifactError: a quantised linear is none of those that ONNX Runtime's dynamic quantiser writes.
    """
    widened = copied(model)
    graph = widened.graph
    halves = frozenset(each.name for each in graph.initializer if each.data_type in HALVES)
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
                attribute.i = TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]  # types of before
    codes = dict(_Integers(graph).dissolved())
    return Plain(widened, codes, halves)


def weighted(graph: onnx.GraphProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """(a product, the initializer that it multiplies by) for those of a plain graph that have one, in the order of its nodes."""
    moved = {each.output[0]: each.input[0] for each in graph.node if each.op_type in MOVES}
    dimensions = {each.name: len(each.dims) for each in graph.initializer}
    for node in graph.node:
        if node.op_type in WEIGHTS:
            name = node.input[1]
            while name in moved:
                name = moved[name]
            if dimensions.get(name) == WEIGHTS[node.op_type]:
                yield node, name


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in HALVES:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


class _Integers:
    """The linears of a graph that ONNX Runtime's dynamic quantiser made: MatMulInteger → Cast → Mul by both scales."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._makers = {name: node for node in graph.node for name in node.output}
        self._stored = {each.name: each for each in graph.initializer}

    def dissolved(self) -> Iterator[tuple[str, Codes]]:
        """(new initializer, what was stored) of each; the graph is changed once all are taken."""
        nodes: dict[str, onnx.NodeProto] = {}
        names: dict[str, str] = {}
        for node in [each for each in self._graph.node if each.op_type == "MatMulInteger"]:
            scaled, scale = self._scaled(node)
            codes = self._codes(node, scale)
            stored = node.input[1]
            if stored not in names:
                own = stored.removesuffix("_quantized")
                names[stored] = f"{stored}.plain" if own in self._stored else own
                self._graph.initializer.append(numpy_helper.from_array(codes.weight, names[stored]))
            image = self._maker(node.input[0], "DynamicQuantizeLinear", node).input[0]
            nodes[scaled.output[0]] = helper.make_node(
                "MatMul", [image, names[stored]], [scaled.output[0]], name=node.name
            )
            yield names[stored], codes
        if nodes:
            replace_nodes(self._graph, [nodes.get(node.output[0], node) for node in self._graph.node])

    def _maker(self, value: str, kind: str, reader: onnx.NodeProto) -> onnx.NodeProto:
        node: onnx.NodeProto | None = self._makers.get(value)
        if node is None or node.op_type != kind:
            raise ArtifactError(
                f"{reader.name or reader.op_type} reads {value!r}, which should come from a {kind}: only int8 linears that "
                "ONNX Runtime's dynamic quantiser writes are understood"
            )
        return node

    def _reader(self, node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
        readers: list[onnx.NodeProto] = [each for each in self._graph.node if node.output[0] in each.input]
        if len(readers) != 1 or readers[0].op_type != kind:
            raise ArtifactError(
                f"{node.name or node.op_type} should be read by one {kind}: only int8 linears that ONNX Runtime's dynamic "
                "quantiser writes are understood"
            )
        return readers[0]

    def _scaled(self, node: onnx.NodeProto) -> tuple[onnx.NodeProto, str]:
        """(the node that gives the linear's result, the initializer with the scales of its weight)."""
        cast = self._reader(node, "Cast")
        scaled = self._reader(cast, "Mul")
        (factor,) = (name for name in scaled.input if name != cast.output[0])
        both = self._maker(factor, "Mul", scaled)
        scale = next((name for name in both.input if name in self._stored), "")
        activation = self._maker(node.input[0], "DynamicQuantizeLinear", node)
        if not scale or activation.output[1] not in both.input or activation.output[2] != node.input[2]:
            raise ArtifactError(f"the scales of {node.name or node.op_type} are not those of what it multiplies")
        return scaled, scale

    def _codes(self, node: onnx.NodeProto, scale: str) -> Codes:
        weight = self._stored.get(node.input[1])
        zero = self._stored.get(node.input[3]) if len(node.input) > 3 else None
        codes = None if weight is None else numpy_helper.to_array(weight)
        if codes is None or codes.dtype != np.int8 or codes.ndim != 2:
            raise ArtifactError(f"the weight of {node.name or node.op_type} is no stored int8 matrix")
        if zero is not None and numpy_helper.to_array(zero).any():
            raise ArtifactError(
                f"the weight of {node.name or node.op_type} has zero points; symmetric ones are understood"
            )
        scales = numpy_helper.to_array(self._stored[scale]).astype(np.float32).reshape(-1)
        return Codes(codes, np.broadcast_to(scales, (codes.shape[1],)))


def replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replaces the nodes of a graph, and removes nodes and initializers that nothing reads any more."""
    wanted = {each.name for each in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):  # in the order of a graph, a reader comes after what it reads
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
    stored = {each.name for each in graph.initializer}
    tensors = [each for each in graph.initializer if each.name in wanted]
    inputs = [each for each in graph.input if each.name in wanted or each.name not in stored]
    for field, entries in ((graph.node, kept[::-1]), (graph.initializer, tensors), (graph.input, inputs)):
        fresh = [copied(entry) for entry in entries]
        del field[:]
        field.extend(fresh)


def copied(message: Copied) -> Copied:
    """A copy of a protobuf message: of a graph that is to be changed, or of an entry, which ends with its field."""
    copy: Copied = type(message)()
    copy.CopyFrom(message)
    return copy
