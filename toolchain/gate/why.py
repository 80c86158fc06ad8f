"""What the bytes of an artifact are: by layer and tensor, so that a change of size has a place. Sums are exact."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.artifacts.size import artifact_files, safetensors_shapes, stored_tensors
from toolchain.gate.evidence import Change

Part = tuple[str, str]
"""(layer, part of it)."""
GRAPH = "(graph)"
# How torch's exporters and onnxsim call what no module of the model names; the numbers shift with every change.
AUTOMATIC = re.compile(r"(_?v(al)?_\d+|onnx::\w+_\d+|const\w*_\d+|\d+|)(_quantized|_scale|_zero_point)?")
MULTIPLIES = frozenset({"MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger", "QLinearMatMul", "DequantizeLinear"})
# What may lie between a weight and the bias that names its layer.
PASSES_ON = (
    frozenset(
        {
            "Reshape",
            "Transpose",
            "Cast",
            "Identity",
            "Squeeze",
            "Unsqueeze",
            "Mul",
            "Add",
            "QuantizeLinear",
            "DynamicQuantizeLinear",
        }
    )
    | MULTIPLIES
)


def size_changes(after: Path, before: Path | None) -> tuple[Change, ...]:
    """The parts whose size changed, largest change first; their changes sum to the difference in bytes, exactly.

    Args:
        after: the artifact.
        before: its baseline; None lists all parts of the artifact, each as new.

    Raises:
        StorageError: an artifact cannot be read.
        ArtifactError: an artifact is damaged.
    """
    new = artifact_parts(after)
    old = Counter[Part]() if before is None else artifact_parts(before)
    changes = [
        Change(layer=layer, part=part, before=old[layer, part], after=new[layer, part])
        for layer, part in {**new, **old}
        if old[layer, part] != new[layer, part]
    ]
    return tuple(sorted(changes, key=lambda row: (-abs(row.change), row.layer, row.part)))


def by_layer(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The same changes, one row for each layer, largest first."""
    before, after = Counter[str](), Counter[str]()
    for row in changes:
        before[row.layer] += row.before
        after[row.layer] += row.after
    rows = [Change(layer=layer, part="", before=before[layer], after=after[layer]) for layer in {**before, **after}]
    return tuple(sorted(rows, key=lambda row: (-abs(row.change), row.layer)))


def artifact_parts(path: Path) -> Counter[Part]:
    """(layer, part) → bytes; the sum is `artifact_size_bytes`, whatever the artifact."""
    if path.suffix == ".onnx" and path.is_file():
        return _onnx_parts(path)
    root = path if path.is_dir() else path.parent
    parts: Counter[Part] = Counter()
    for file in artifact_files(path):
        name = file.relative_to(root).as_posix()
        if file.suffix == ".safetensors":
            parts.update(_safetensors_parts(file, name))
        else:
            parts[f"(file {name})", ""] += file.stat().st_size
    return parts


def _safetensors_parts(file: Path, name: str) -> Counter[Part]:
    parts: Counter[Part] = Counter()
    for tensor, (_, size) in safetensors_shapes(file).items():
        parts[_layer_and_part(tensor)] += size
    parts[f"(file {name})", "header"] += file.stat().st_size - sum(parts.values())
    return parts


def _onnx_parts(path: Path) -> Counter[Part]:
    model = read_onnx(path)
    names = dict(_named(model.graph))
    sizes = {file.relative_to(path.parent).as_posix(): file.stat().st_size for file in artifact_files(path)}
    parts: Counter[Part] = Counter()
    seen: set[tuple[str, int | None]] = set()
    for tensor in stored_tensors(model):
        part = names.get(tensor.name) or (
            (GRAPH, "constants") if AUTOMATIC.fullmatch(tensor.name) else _layer_and_part(tensor.name)
        )
        inline = tensor.ByteSize()
        sizes[path.name] -= inline
        if uses_external_data(tensor):
            parts[GRAPH, "external references"] += inline
            info = ExternalDataInfo(tensor)
            where = PurePosixPath(info.location).as_posix()  # "./weights.bin" is that file too
            if (where, info.offset) not in seen:  # two tensors may share their bytes
                seen.add((where, info.offset))
                size = info.length or min(tensor_bytes(tensor), sizes[where])
                sizes[where] -= size
                parts[part] += size
        elif inline:
            parts[part] += inline
    parts[GRAPH, "nodes and metadata"] += sizes.pop(path.name)
    for name, rest in sizes.items():
        parts[f"(file {name})", "between tensors"] += rest
    return parts


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """The bytes of a tensor's values, from its type and shape."""
    count = 1
    for size in tensor.dims:
        count *= size
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


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
                last = _layer_and_part(name)[0]
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
            layer = _layer_and_part(bias)[0]
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


def _layer_and_part(name: str) -> Part:
    """blocks.0.attn.qkv.weight → (blocks.0.attn.qkv, weight)."""
    layer, dot, part = name.rpartition(".")
    return (layer, part) if dot else (name, "")
