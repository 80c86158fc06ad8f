"""The types in which any ONNX graph stores its weights and rounds its values.

Precision is read from the graph: metadata may be missing, or copied from the file that this one was made from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import TensorProto
from onnx.inliner import inline_local_functions

from toolchain.artifacts.onnx_walk import linked, stored

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
    return _Graph(model, "the ONNX graph").weight_types()


def coarsest(names: set[str]) -> str:
    """The coarsest of some types; "" if there are none."""
    return min(names & set(COARSEST_FIRST), key=COARSEST_FIRST.index, default="")


def graph_precision(model: onnx.ModelProto, called: str = "the ONNX graph") -> tuple[str, str]:
    """(the coarsest type that a graph rounds its weights or values to, the words that say where); ("", why) if none is found.

    Args:
        model: the graph.
        called: what a message calls it, as for `linked`.
    """
    graph = _Graph(model, called)
    weights = graph.weight_types()
    unknown = weights.pop("", 0)
    rest = f"; {unknown} product{'s' if unknown > 1 else ''} not recognised" if unknown else ""
    if not weights:
        return "", f"it holds no weights of linears or convolutions that slimvit knows{rest}"
    held, elsewhere = coarsest(set(weights)), coarsest(graph.rounded_to())
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
    """The nodes of a graph and of those inside its nodes, functions inlined, and which values follow from stored tensors alone."""

    def __init__(self, model: onnx.ModelProto, called: str) -> None:
        inlined = inline_local_functions(model) if model.functions else model
        self.nodes = list(linked(inlined, called).graph.all_nodes())
        self.values: dict[ir.Value, _Stored] = {}
        for node in self.nodes:  # sorted, so that one pass is enough
            values = [self.value(each) for each in node.inputs[: 1 if node.op_type in DATA_FIRST else None] if each]
            known = [value for value in values if value is not None]
            if values and len(known) == len(values):
                self.values.update(dict.fromkeys(node.outputs, _made_of(node, known)))

    def weight_types(self) -> Counter[str]:
        """As `weight_types` of the module."""
        return Counter(name for node in self.nodes if (name := self._product(node)) is not None)

    def rounded_to(self) -> set[str]:
        """The types that values are rounded to anywhere: by Cast, by QuantizeLinear, or as stored floats."""
        names: set[str] = set()
        for node in self.nodes:
            floats = {type_name(tensor.dtype) for value in node.inputs if (tensor := stored(value)) is not None}
            if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
                names.add(_quantised_to(node))
            elif node.op_type == "Cast":
                floats.add(type_name(node.attributes.get_int("to", 0)))
            names |= floats & {"bf16", "fp16", "fp8", "fp4"}
        return names - {""}

    def value(self, value: ir.Value) -> _Stored | None:
        """What is known of a value that follows from stored tensors alone; None of others."""
        if (tensor := stored(value)) is None:
            return self.values.get(value)
        sizes = tensor.shape.numpy()
        return _Stored(type_name(tensor.dtype) if max(sizes, default=1) > 1 else "", len(sizes) > 1)

    def _product(self, node: ir.Node) -> str | None:
        """The coarsest type of the weights that a node multiplies by; None if it is no product, or not one of a weight with activations."""
        if not PRODUCT.search(node.op_type):
            return None
        values = [self.value(each) for each in node.inputs[: OPERANDS.get(node.op_type)] if each]
        weights = [value for value in values if value is not None and value.matrix]
        if not weights or None not in values:
            return None
        kinds = {value.kind for value in weights} - {""}
        if kinds and (bits := node.attributes.get_int(BITS, 4 if "NBits" in node.op_type else 0)):
            kinds.add(f"int{bits}")
        return coarsest(kinds)


def _made_of(node: ir.Node, values: Sequence[_Stored]) -> _Stored:
    """What a node makes of stored values."""
    matrix = any(value.matrix for value in values)
    kinds = {value.kind for value in values if value.matrix or not matrix} - {""}  # scales of a matrix do not count
    if kinds and node.op_type == "Cast":
        kinds.add(type_name(node.attributes.get_int("to", 0)))
    elif kinds and node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
        kinds.add(_quantised_to(node))
    return _Stored(coarsest(kinds), matrix or node.op_type in RESHAPED)


def _quantised_to(node: ir.Node) -> str:
    """The type that a QuantizeLinear rounds to: that of its zero point, or what it is told, or uint8."""
    zero = stored(node.inputs[2]) if len(node.inputs) > 2 else None
    told = node.attributes.get_int("output_dtype", 0) or TensorProto.UINT8
    return type_name(told if zero is None else zero.dtype)
