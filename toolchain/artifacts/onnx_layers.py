"""The bytes of an ONNX file by layer and part, so that a change of size has a place. Sums are exact."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import onnx
import onnx_ir as ir

from toolchain.artifacts.base import Part, layer_and_part
from toolchain.artifacts.onnx_walk import only_reader, unscaled

GRAPH, UNNAMED = "(graph)", "(weights without a name)"
AUTOMATIC = re.compile(r"(_?v(al)?_\d+|onnx::\w+_\d+|const\w*_\d+|\d+|)(_quantized|_scale|_zero_point)?")
"""Names that torch's exporters and onnxsim generate; their numbers change with every change of the model."""
MULTIPLIES = frozenset(
    {"MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger", "QLinearMatMul", "DequantizeLinear", "Cast"}
)
PASSES_ON = MULTIPLIES | {
    *("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Mul", "Add"),
    *("QuantizeLinear", "DynamicQuantizeLinear"),
}
"""What may lie between a weight and the bias that names its layer."""


def onnx_parts(graph: ir.Graph, tensors: Iterable[onnx.TensorProto], name: str, sizes: dict[str, int]) -> Counter[Part]:
    """(layer, part of it) → bytes.

    Args:
        graph: that of the file.
        tensors: every tensor that is stored in the file.
        name: of the file itself, in `sizes`.
        sizes: file → its bytes; all of them are attributed.
    """
    names = dict(named_weights(graph))
    parts: Counter[Part] = Counter()
    seen: set[tuple[str, int | None]] = set()
    for tensor in tensors:
        part = names.get(tensor.name) or (
            (GRAPH, "constants") if AUTOMATIC.fullmatch(tensor.name) else layer_and_part(tensor.name)
        )
        inline = tensor.ByteSize()
        sizes[name] -= inline
        if isinstance(info := ir.serde.deserialize_tensor(tensor), ir.ExternalTensor):
            parts[GRAPH, "external references"] += inline
            where = PurePosixPath(info.location).as_posix()  # "./weights.bin" is that file too
            if (where, info.offset) not in seen:  # two tensors may share their bytes
                seen.add((where, info.offset))
                size = info.length or min(info.nbytes, sizes[where])
                sizes[where] -= size
                parts[part] += size
        elif inline:
            parts[part] += inline
    parts[GRAPH, "nodes and metadata"] += sizes.pop(name)
    for other, rest in sizes.items():
        parts[f"(file {other})", "between tensors"] += rest
    return parts


def named_weights(graph: ir.Graph) -> Iterator[tuple[str, Part]]:
    """(initializer, its layer and part) for weights that the exporter gave a number.

    A linear's weight has lost its name, its bias has not: it follows a few nodes later. The first of two factors has no
    bias; what follows it is the second factor's matmul, whose layer is called `up`.
    """
    own = {value for name, value in graph.initializers.items() if not AUTOMATIC.fullmatch(name)}
    unnamed = {x for x in graph.initializers.values() if x not in own and len(x.shape or ()) >= 2}
    taken: Counter[Part] = Counter()
    last = GRAPH
    for node in graph:
        for value in node.inputs:
            if value in own:
                last = layer_and_part(str(value.name))[0]
            elif value in unnamed and node.op_type in MULTIPLIES:
                layer = _layer_of(node, own, unnamed) or (UNNAMED if last == GRAPH else f"after {last}")
                part = (layer, "weight")
                taken[part] += 1
                yield str(value.name), part if taken[part] == 1 else (layer, f"weight {taken[part]}")
                unnamed.remove(value)


def _layer_of(node: ir.Node, own: set[ir.Value], unnamed: set[ir.Value]) -> str | None:
    """The layer that a node with an unnamed weight belongs to, from the bias that it or a node soon after it adds."""
    reached, crossed = node, False
    for _ in range(12):
        if (bias := next((value for value in map(unscaled, reached.inputs) if value in own), None)) is not None:
            layer = layer_and_part(str(bias.name))[0]
            if not crossed:
                return layer
            stem, dot, factor = layer.rpartition(".")
            return f"{stem}{dot}down" if factor == "up" else None
        if (following := only_reader(reached.outputs[0])) is None:
            return None
        reached = following
        if unnamed.intersection(map(unscaled, reached.inputs)) - {*node.inputs}:
            crossed = True
        elif reached.op_type not in PASSES_ON:
            return None
    return None
