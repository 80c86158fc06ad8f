"""The bytes of an ONNX file by layer and part, so that a change of size has a place. Sums are exact."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from toolchain.artifacts.base import Part, layer_and_part

GRAPH = "(graph)"
AUTOMATIC = re.compile(r"(_?v(al)?_\d+|onnx::\w+_\d+|const\w*_\d+|\d+|)(_quantized|_scale|_zero_point)?")
"""How torch's exporters and onnxsim call what no module of the model names; the numbers shift with every change."""
MULTIPLIES = frozenset({"MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger", "QLinearMatMul", "DequantizeLinear"})
PASSES_ON = MULTIPLIES | {
    *("Reshape", "Transpose", "Cast", "Identity", "Squeeze", "Unsqueeze", "Mul", "Add"),
    *("QuantizeLinear", "DynamicQuantizeLinear"),
}
"""What may lie between a weight and the bias that names its layer."""


def onnx_parts(
    model: onnx.ModelProto, tensors: Iterable[onnx.TensorProto], name: str, sizes: dict[str, int]
) -> Counter[Part]:
    """(layer, part of it) → bytes.

    Args:
        model: the graph.
        tensors: every tensor that is stored in it.
        name: of the file itself, in `sizes`.
        sizes: file → its bytes; all of them are attributed.
    """
    names = dict(_named(model.graph))
    parts: Counter[Part] = Counter()
    seen: set[tuple[str, int | None]] = set()
    for tensor in tensors:
        part = names.get(tensor.name) or (
            (GRAPH, "constants") if AUTOMATIC.fullmatch(tensor.name) else layer_and_part(tensor.name)
        )
        inline = tensor.ByteSize()
        sizes[name] -= inline
        if uses_external_data(tensor):
            parts[GRAPH, "external references"] += inline
            info = ExternalDataInfo(tensor)
            where = PurePosixPath(info.location).as_posix()  # "./weights.bin" is that file too
            if (where, info.offset) not in seen:  # two tensors may share their bytes
                seen.add((where, info.offset))
                size = info.length or min(_bytes(tensor), sizes[where])
                sizes[where] -= size
                parts[part] += size
        elif inline:
            parts[part] += inline
    parts[GRAPH, "nodes and metadata"] += sizes.pop(name)
    for other, rest in sizes.items():
        parts[f"(file {other})", "between tensors"] += rest
    return parts


def _bytes(tensor: onnx.TensorProto) -> int:
    return int(math.prod(tensor.dims)) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _named(graph: onnx.GraphProto) -> Iterator[tuple[str, Part]]:
    """(initializer, its layer and part) for weights that the exporter gave a number.

    A linear's weight has lost its name, its bias has not: it follows a few nodes later. The first of two factors has no
    bias; what follows it is the second factor's matmul, whose layer is called `up`.
    """
    own = {t.name for t in graph.initializer if not AUTOMATIC.fullmatch(t.name)}
    unnamed = {t.name: len(t.dims) for t in graph.initializer if AUTOMATIC.fullmatch(t.name)}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    # What is quantised is read behind its scale.
    aliases = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    taken: Counter[Part] = Counter()
    last = GRAPH
    for node in graph.node:
        for name in node.input:
            if name in own:
                last = layer_and_part(name)[0]
            elif unnamed.get(name, 0) >= 2 and node.op_type in MULTIPLIES:
                layer = _layer_of(node, readers, own, unnamed, aliases) or f"after {last}"
                part = (layer, "weight")
                taken[part] += 1
                yield name, part if taken[part] == 1 else (layer, f"weight {taken[part]}")
                unnamed.pop(name)


def _layer_of(
    node: onnx.NodeProto,
    readers: dict[str, list[onnx.NodeProto]],
    own: set[str],
    unnamed: dict[str, int],
    aliases: dict[str, str],
) -> str | None:
    """The layer that a node with an unnamed weight belongs to, from the bias that it or a node soon after it adds."""
    reached, crossed = node, False
    for _ in range(12):
        inputs = [aliases.get(name, name) for name in reached.input]
        if (bias := next((name for name in inputs if name in own), None)) is not None:
            layer = layer_and_part(bias)[0]
            if not crossed:
                return layer
            stem, dot, factor = layer.rpartition(".")
            return f"{stem}{dot}down" if factor == "up" else None
        following = readers.get(reached.output[0], [])
        if len(following) != 1:
            return None
        reached = following[0]
        weights = [aliases.get(name, name) for name in reached.input]
        if any(unnamed.get(name, 0) >= 2 and name not in node.input for name in weights):
            crossed = True
        elif reached.op_type not in PASSES_ON:
            return None
    return None
