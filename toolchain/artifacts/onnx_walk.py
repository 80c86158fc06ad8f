"""ONNX graphs linked by onnx-ir, and helpers for walking over their values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from toolchain.artifacts.onnx_bare import bare
from toolchain.errors import ArtifactError


def linked(model: onnx.ModelProto, called: str = "the ONNX graph") -> ir.Model:
    """The same graph with links from each value to its producer and readers; large weights are only described.

    Values and nodes refer to each other, so weights would stay in memory until Python's garbage collector runs.

    Args:
        model: the graph.
        called: what a message calls it: the file, where it was read from one.

    Raises:
        ArtifactError: onnx-ir cannot read it.
    """
    try:
        return ir.from_proto(bare(model))
    except (ir.serde.SerdeError, NotImplementedError, ValueError) as error:
        raise ArtifactError(
            f"onnx-ir {ir.__version__} cannot read {called}: {error}; export it without what is named here"
        ) from error


@contextmanager
def linked_weights(model: onnx.ModelProto) -> Iterator[ir.Graph]:
    """The graph of `linked` with the weights in it, which are let go after the block."""
    graph = linked(model).graph
    for tensor in model.graph.initializer:
        graph.initializers[tensor.name].const_value = ir.serde.deserialize_tensor(tensor)
    try:
        yield graph
    finally:
        for value in graph.initializers.values():
            value.const_value = None


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value is, an initializer or a Constant; None if it is computed, or an input that was left out.

    The one in a Constant keeps its name: onnx-ir's `get_const_tensor` would give it another, in the file's message as well.
    """
    if value is None:
        return None
    if (node := value.producer()) is not None and node.op_type == "Constant":
        return node.attributes.get_tensor("value")
    return value.const_value


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if it is read once."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 else None


def unscaled(value: ir.Value | None) -> ir.Value | None:
    """The value itself, or what it was before DequantizeLinear, or before a Cast of something that is stored."""
    if value is None or (node := value.producer()) is None:
        return value
    narrowed = node.op_type == "DequantizeLinear" or (node.op_type == "Cast" and stored(node.inputs[0]) is not None)
    return node.inputs[0] if narrowed else value


def quantisation(graph: onnx.GraphProto) -> tuple[set[str], set[str]]:
    """(the names of stored scales and zero points, those of what is stored quantised) in a graph, whether or not it can be linked."""
    makers = {output: node for node in graph.node for output in node.output}

    def before(name: str) -> str:
        """What a value was before a Cast or DequantizeLinear."""
        node = makers.get(name)
        return node.input[0] if node is not None and node.op_type in ("Cast", "DequantizeLinear") else name

    scales, codes = set[str](), set[str]()
    for node in graph.node:
        inputs = list(node.input)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales |= {*inputs[1:3]}
            codes |= {*inputs[:1]}
        elif node.op_type == "MatMulInteger":
            scales |= {*inputs[2:4]}
            codes |= {*map(before, inputs[1:2])}
        elif node.op_type == "Mul":  # the scale of an input that is rounded in each call, times that of the weight
            dynamic = {
                name
                for name in inputs
                if name in makers and makers[name].op_type == "DynamicQuantizeLinear" and name == makers[name].output[1]
            }
            scales |= {before(name) for name in inputs if dynamic and name not in dynamic}
    return scales, codes
