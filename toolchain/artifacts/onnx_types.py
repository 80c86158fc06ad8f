"""In which types a graph holds its weights and rounds its values, whoever wrote it.

Precision is in the graph. What a file's metadata says of it may be missing, or left over from the file that it was made from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

COARSEST_FIRST = ("int2", "int4", "fp4", "fp6", "int8", "fp8", "int16", "bf16", "fp16", "fp32", "fp64")
PRODUCT = re.compile(r"MatMul|Gemm|Conv|Attention|Einsum|LSTM|GRU")
"""Operators that multiply by weights, of ONNX itself and of the runtimes' own domains."""
DATA_FIRST = frozenset(["Reshape", "Expand", "Slice", "Tile", "Pad", "Squeeze", "Unsqueeze", "Split", "CastLike"])
"""Operators whose first input is the value and whose others only say what becomes of it."""
RESHAPED = frozenset(["Reshape", "Unsqueeze", "Expand"])
"""What may make a matrix of a weight that is stored as one row."""
OPERANDS = {"Gemm": 2, "Conv": 2, "ConvTranspose": 2}
"""How many inputs of a product are multiplied; the rest is a bias."""
BITS = "bits"
"""The attribute of MatMulNBits and its like, whose packed weights look like uint8."""


def type_name(kind: int) -> str:
    """The name of a tensor's element type among `COARSEST_FIRST`; "" of one that no weight has."""
    name = TensorProto.DataType.Name(kind)
    whole = {"FLOAT": "fp32", "DOUBLE": "fp64", "FLOAT16": "fp16", "BFLOAT16": "bf16"}
    if name in whole:
        return whole[name]
    if name.startswith("FLOAT"):
        return f"fp{name[len('FLOAT')]}"
    bits = name.removeprefix("U").removeprefix("INT")
    return f"int{bits}" if bits in ("2", "4", "8", "16") else ""


def weight_types(model: onnx.ModelProto) -> Counter[str]:
    """Type → number of linears and convolutions whose stored weights are rounded to it on their way, functions inlined.

    The type is the coarsest on the way from the stored tensor to the product: weights may be stored in fp32 and rounded by
    a Cast or a pair of Q/DQ, or stored in int8 and multiplied in fp32. "" is a product with a stored operand of no type that is
    known. Attention's own products have no stored operand, and what is added to activations is no weight.
    """
    graph = _Graph(_inlined(model))
    return Counter(name for node in graph.nodes if (name := graph.product(node)) is not None)


def rounded_to(model: onnx.ModelProto) -> set[str]:
    """The types that values are rounded to anywhere in a graph: by Cast, by QuantizeLinear, or as stored floats."""
    graph = _Graph(_inlined(model))
    names = {type_name(tensor.data_type) for tensor in graph.stored.values()} & {"bf16", "fp16", "fp8", "fp4"}
    for node in graph.nodes:
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            names.add(graph.quantised_to(node))
        elif node.op_type == "Cast":
            names |= {type_name(_attribute(node, "to"))} & {"bf16", "fp16", "fp8", "fp4"}
    return names - {""}


def coarsest(names: set[str]) -> str:
    """The one of some types that keeps the least of a number; "" of none."""
    return min(names & set(COARSEST_FIRST), key=COARSEST_FIRST.index, default="")


def graph_precision(model: onnx.ModelProto) -> tuple[str, str]:
    """(the coarsest type that a graph rounds its weights or values to, the words that say where); ("", why) if none is found."""
    weights = weight_types(model)
    unknown = weights.pop("", 0)
    rest = f"; {unknown} product{'s' if unknown > 1 else ''} not recognised" if unknown else ""
    if not weights:
        return "", f"it holds no weights of linears or convolutions that slimvit knows{rest}"
    held, elsewhere = coarsest(set(weights)), coarsest(rounded_to(model))
    if elsewhere and COARSEST_FIRST.index(elsewhere) < COARSEST_FIRST.index(held):
        return elsewhere, f"its weights are {held}, and other values are rounded to {elsewhere}{rest}"
    return held, f"{weights[held]} of {weights.total()} linears and convolutions hold {held} weights{rest}"


@dataclass(frozen=True)
class _Stored:
    """A value that follows from stored tensors alone.

    Attributes:
        kind: the coarsest type on its way; "" where that is of no weight.
        matrix: whether it has two dimensions or more.
    """

    kind: str
    matrix: bool


class _Graph:
    """Nodes and stored tensors of a graph and of those inside its nodes: names are unique across them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, onnx.TensorProto] = {}
        for graph in _graphs(model.graph):
            self.nodes += graph.node
            self.stored |= {tensor.name: tensor for tensor in graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                self.stored.update((node.output[0], each.t) for each in node.attribute if each.name == "value")
        self.values = self._values()

    def product(self, node: onnx.NodeProto) -> str | None:
        """The coarsest type of the weights that a node multiplies by; None if it is no product, or not one of a weight with activations."""
        if not PRODUCT.search(node.op_type):
            return None
        names = [name for name in node.input[: OPERANDS.get(node.op_type)] if name]
        weights = [value for name in names if (value := self.values.get(name)) and value.matrix]
        if not weights or all(name in self.values for name in names):
            return None
        kinds = {value.kind for value in weights} - {""}
        if kinds and (bits := _attribute(node, BITS, 4 if "NBits" in node.op_type else 0)):
            kinds.add(f"int{bits}")
        return coarsest(kinds)

    def _values(self) -> dict[str, _Stored]:
        """Every value that follows from stored tensors alone; nodes are sorted, so that one pass is enough."""
        values = {
            name: _Stored(type_name(tensor.data_type) if max(tensor.dims, default=1) > 1 else "", len(tensor.dims) > 1)
            for name, tensor in self.stored.items()
        }
        for node in self.nodes:
            names = [name for name in (node.input[:1] if node.op_type in DATA_FIRST else node.input) if name]
            if names and all(name in values for name in names):
                value = self._made_of(node, [values[name] for name in names])
                values.update(dict.fromkeys(node.output, value))
        return values

    def _made_of(self, node: onnx.NodeProto, given: Sequence[_Stored]) -> _Stored:
        """What a node makes of stored values."""
        matrix = any(value.matrix for value in given)
        kinds = {value.kind for value in given if value.matrix or not matrix} - {""}  # scales of a matrix do not count
        if kinds and node.op_type == "Cast":
            kinds.add(type_name(_attribute(node, "to")))
        elif kinds and node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            kinds.add(self.quantised_to(node))
        return _Stored(coarsest(kinds), matrix or node.op_type in RESHAPED)

    def quantised_to(self, node: onnx.NodeProto) -> str:
        """The type that a QuantizeLinear rounds to: that of its zero point, or what it is told, or uint8."""
        if len(node.input) > 2 and node.input[2] in self.stored:
            return type_name(self.stored[node.input[2]].data_type)
        return type_name(_attribute(node, "output_dtype", 0) or TensorProto.UINT8)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    if not model.functions:
        return model
    from onnx.inliner import inline_local_functions

    inlined: onnx.ModelProto = inline_local_functions(model)
    return inlined


def _attribute(node: onnx.NodeProto, name: str, default: Any = 0) -> int:
    return int(next((each.i for each in node.attribute if each.name == name), default))
