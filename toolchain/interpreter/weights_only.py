"""An int8-dynamic graph with its activations as they are: the same int8 weights, read by linears in floating point.

Runtimes that store int8 weights and compute in floats are given this graph, so that they ship the integers that were judged.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from toolchain.errors import ArtifactError

INTEGER, ROUNDING = "MatMulInteger", "DynamicQuantizeLinear"


def weights_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a MatMul of dequantised weights in place of each product of integers; one without any is given back.

    What is looked for is what ONNX Runtime's quantiser writes: DynamicQuantizeLinear, MatMulInteger, Cast, and the Mul by both
    scales.

    Raises:
        ArtifactError: a product of integers stands among other nodes than these.
    """
    if not any(node.op_type == INTEGER for node in model.graph.node):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = [*changed.graph.node]
    makers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    stored = {each.name for each in changed.graph.initializer}
    replaced: dict[int, list[onnx.NodeProto]] = {}
    for node in (each for each in nodes if each.op_type == INTEGER):
        rounded, scales, end = _around(node, makers, readers)
        scale = next((name for name in scales.input if name in stored), "")
        if not scale or not {*node.input[1:2], *node.input[3:4]} <= stored:
            raise ArtifactError(f"the weight of {node.name!r}, or its scale, is no constant")
        weight = f"{node.input[1]}_dequantised"
        dequantised = helper.make_node(
            "DequantizeLinear", [node.input[1], scale, *node.input[3:4]], [weight], f"{node.name}_weight", axis=1
        )
        product = helper.make_node("MatMul", [rounded.input[0], weight], [end.output[0]], node.name)
        replaced[id(end)] = [dequantised, product]
        (cast,) = readers[node.output[0]]
        replaced |= {id(node): [], id(cast): []}
    kept = [each for node in nodes for each in replaced.get(id(node), [node])]
    changed.graph.ClearField("node")
    changed.graph.node.extend(_used(kept, {each.name for each in changed.graph.output}))
    return changed


def _around(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], readers: Mapping[str, list[onnx.NodeProto]]
) -> tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]:
    """(what rounds the activation, the product of both scales, the Mul that ends it) of a product of integers."""
    rounded, found = makers.get(node.input[0]), node
    for wanted in ("Cast", "Mul"):
        after = readers.get(found.output[0], [])
        if len(after) != 1 or after[0].op_type != wanted:
            raise ArtifactError(f"{node.name!r} is a {INTEGER} that no {wanted} alone reads, which is not understood")
        (found,) = after
    scales = next((makers[name] for name in found.input if name in makers and makers[name].op_type == "Mul"), None)
    if rounded is None or rounded.op_type != ROUNDING or scales is None or rounded.output[1] not in scales.input:
        raise ArtifactError(f"{node.name!r} is a {INTEGER} without a {ROUNDING} and its scale, which is not understood")
    return rounded, scales, found


def _used(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes whose outputs are read, in their order."""
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]
