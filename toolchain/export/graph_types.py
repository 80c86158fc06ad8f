"""In which types a graph holds its weights and rounds its values, whoever wrote it.

Precision is in the graph. What a file's metadata says of it may be missing, or left over from the file that it was made from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto

COARSEST_FIRST = ("int2", "int4", "fp4", "fp6", "int8", "fp8", "int16", "bf16", "fp16", "fp32", "fp64")
PRODUCT = re.compile(r"MatMul|Gemm|Conv|Attention|Einsum|LSTM|GRU")
"""Operators that multiply by weights, of ONNX itself and of the runtimes' own domains."""
MOVED = ("Transpose", "Reshape", "Flatten", "Identity", "Squeeze", "Unsqueeze", "DequantizeLinear", "CastLike")
SCALED = ("Mul", "Div", "Sub", "Add")
"""A weight that is dequantised by hand goes through these."""
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
    a Cast or a pair of Q/DQ, or stored in int8 and multiplied in fp32. Attention's own products have no stored operand.
    """
    graph = _Graph(_inlined(model))
    return Counter(name for node in graph.nodes if (name := graph.product(node)))


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
    if not weights:
        return "", "it holds no weights of linears or convolutions that slimvit knows"
    held, elsewhere = coarsest(set(weights)), coarsest(rounded_to(model))
    if elsewhere and COARSEST_FIRST.index(elsewhere) < COARSEST_FIRST.index(held):
        return elsewhere, f"its weights are {held}, and other values are rounded to {elsewhere}"
    return held, f"{weights[held]} of {weights.total()} linears and convolutions hold {held} weights"


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
        self.producers = {name: node for node in self.nodes for name in node.output}

    def product(self, node: onnx.NodeProto) -> str:
        """The coarsest type of the weights that a node multiplies by; "" if it is no product, or one of activations."""
        if not PRODUCT.search(node.op_type):
            return ""
        names = {name for each in node.input if (name := self._weight(each, 0))}
        if names and (bits := _attribute(node, BITS, 4 if "NBits" in node.op_type else 0)):
            names.add(f"int{bits}")
        return coarsest(names)

    def _weight(self, name: str, depth: int) -> str:
        """The coarsest type between a stored matrix and where it is used; "" if what is used is none."""
        if name in self.stored:
            tensor = self.stored[name]
            return type_name(tensor.data_type) if len(tensor.dims) >= 2 else ""
        node = self.producers.get(name)
        if node is None or depth > 20:
            return ""
        if node.op_type in SCALED:
            return coarsest({self._weight(each, depth + 1) for each in node.input})
        if node.op_type not in (*MOVED, "Cast", "QuantizeLinear"):
            return ""
        before = self._weight(node.input[0], depth + 1)
        here = ""
        if node.op_type == "Cast":
            here = type_name(_attribute(node, "to"))
        elif node.op_type == "QuantizeLinear":
            here = self.quantised_to(node)
        return coarsest({before, here}) if before else ""

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
