"""An ONNX graph in the words that pnnx understands: batch 1, fp32, and no form that it would read as another.

Each rewrite is exact but for the order of sums, and none changes the file that it is made from. What pnnx misreads nevertheless
is caught behind it, by its log, by the shapes of the outputs and by parity.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from toolchain.artifacts.onnx_plain import plain
from toolchain.errors import ArtifactError
from toolchain.interpreter import graph_of

UNBOUND = (2, 0, 3, 1, 4)
"""How timm brings queries, keys and values [B, N, 3, H, D] to the front, to unbind them."""

Ranges = tuple[tuple[int, int, int], ...]
"""(axis, first, end) of each axis that a Slice takes a part of."""


def for_pnnx(path: Path) -> onnx.ModelProto:
    """The graph of an ONNX file, with its weights, rewritten; numbers of fp16 are in fp32, and pnnx rounds them back without a loss.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it is damaged.
    """
    model = plain(graph_of(path)).model
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    try:
        linked = ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))
    except (onnx.shape_inference.InferenceError, ir.serde.SerdeError, ValueError) as error:
        raise ArtifactError(f"{path}: its shapes at batch 1 cannot be inferred: {error}") from error
    _drop_casts(linked.graph)
    _mean_as_product(linked.graph)
    _split_attention(linked.graph)
    _rotate_by_product(linked.graph)
    _add_stacked(linked.graph)
    RemoveUnusedNodesPass()(linked)
    return ir.to_proto(linked)


def _drop_casts(graph: ir.Graph) -> None:
    """Casts from fp32 to fp32 go."""
    for node in graph:
        if node.op_type != "Cast":
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is not None and source.dtype == target.dtype == ir.DataType.FLOAT:
            node.op_type = "Identity"
            node.attributes.clear()
    IdentityEliminationPass()(ir.Model(graph, ir_version=10))


def _mean_as_product(graph: ir.Graph) -> None:
    """Means over one axis, which pnnx converts without the axis: as a product over the last, as a mean over two for tokens."""
    for node in [node for node in graph if node.op_type == "ReduceMean" and len(node.inputs) > 1]:
        source, axes, sizes = node.inputs[0], _integers(node.inputs[1]), _sizes(node.inputs[0])
        if len(axes) != 1 or not sizes:
            continue
        axis, keepdims = axes[0] % len(sizes), node.attributes.get_int("keepdims", 1)
        if axis == len(sizes) - 1 and keepdims:
            column = _constant(graph, node, np.full((sizes[-1], 1), 1 / sizes[-1], np.float32), "mean")
            _replace(graph, node, [ir.node("MatMul", [source, column])])
        elif (axis, len(sizes), keepdims) == (1, 3, 0):
            shape = _constant(graph, node, np.array([1, sizes[1], 1, sizes[2]]), "shape")
            apart = ir.node("Reshape", [source, shape])
            both = _constant(graph, node, np.array([1, 2]), "axes")
            _replace(graph, node, [apart, ir.node("ReduceMean", [apart.outputs[0], both], {"keepdims": 0})])


def _split_attention(graph: ir.Graph) -> None:
    """Queries, keys and values that are unbound from [1, N, 3, H, D], a rank too many: split from [1, 3·H, N, D]."""
    for turn in [node for node in graph if node.op_type == "Transpose"]:
        source, sizes = turn.inputs[0], _sizes(turn.inputs[0])
        shaper = source.producer() if source is not None else None
        slices = sorted((use.node for use in turn.outputs[0].uses()), key=_place)
        squeezes = [use.node for each in slices for use in each.outputs[0].uses()]
        if (
            shaper is None
            or shaper.op_type != "Reshape"
            or tuple(turn.attributes.get_ints("perm", ())) != UNBOUND
            or sizes[:1] != (1,)
            or [_place(each) for each in slices] != list(range(sizes[2]))
            or [each.op_type for each in squeezes] != ["Squeeze"] * sizes[2]
        ):
            continue
        _, tokens, parts, heads, width = sizes
        flat = ir.node(
            "Reshape", [shaper.inputs[0], _constant(graph, turn, np.array([1, tokens, parts * heads, width]), "shape")]
        )
        turned = ir.node("Transpose", [flat.outputs[0]], {"perm": [0, 2, 1, 3]})
        each = _constant(graph, turn, np.full(parts, heads), "heads")
        split = ir.node("Split", [turned.outputs[0], each], {"axis": 1}, num_outputs=parts)
        _replace(graph, turn, [flat, turned, split], [squeeze.outputs[0] for squeeze in squeezes])


def _rotate_by_product(graph: ir.Graph) -> None:
    """Rotary positions of neighbours, (a, b) → (−b, a), by slices of every second number, which ncnn has not: as a product."""
    for node in [node for node in graph if node.op_type == "Reshape"]:
        joined = _producer(node, 0, "Concat")
        left, right = (_producer(joined, index, "Unsqueeze") for index in (0, 1))
        odd, even = _producer(_producer(left, 0, "Neg"), 0, "Slice"), _producer(right, 0, "Slice")
        shape = _sizes(node.outputs[0])
        if joined is None or odd is None or even is None or not shape or len(joined.inputs) != 2:
            continue
        width = shape[-1]
        apart = _sizes(joined.outputs[0])
        last = len(apart) - 2
        pair = _every_second(odd, last), _every_second(even, last)
        if (
            odd.inputs[0] is not even.inputs[0]
            or apart != (*shape[:-1], width // 2, 2)
            or joined.attributes.get_int("axis", 0) not in (-1, last + 1)
            or pair[0] is None
            or pair[1] is None
            or (pair[0][0], pair[1][0]) != (1, 0)
            or pair[0][1] != pair[1][1]
        ):
            continue
        source, ranges = odd.inputs[0], pair[0][1]
        nodes = []
        if ranges:
            axes, starts, ends = (np.array(numbers) for numbers in zip(*ranges, strict=True))
            named = (("starts", starts), ("ends", ends), ("axes", axes))
            nodes.append(ir.node("Slice", [source, *(_constant(graph, node, each, what) for what, each in named)]))
            source = nodes[0].outputs[0]
        turn = np.zeros((width, width), np.float32)
        turn[range(1, width, 2), range(0, width, 2)] = -1
        turn[range(0, width, 2), range(1, width, 2)] = 1
        _replace(graph, node, [*nodes, ir.node("MatMul", [source, _constant(graph, node, turn, "turn")])])


def _add_stacked(graph: ir.Graph) -> None:
    """Sums over tensors that were stacked, whose new axis pnnx takes for the batch: as additions."""
    for node in [node for node in graph if node.op_type == "ReduceSum" and len(node.inputs) > 1]:
        joined = _producer(node, 0, "Concat")
        if joined is None or _integers(node.inputs[1]) != (0,) or node.attributes.get_int("keepdims", 1) != 0:
            continue
        stacked = [_producer(joined, index, "Unsqueeze") for index in range(len(joined.inputs))]
        if joined.attributes.get_int("axis", 1) != 0 or any(
            e is None or _integers(e.inputs[1]) != (0,) for e in stacked
        ):
            continue
        parts = [each.inputs[0] for each in stacked if each is not None]
        sums = [ir.node("Add", parts[:2])]
        for part in parts[2:]:
            sums.append(ir.node("Add", [sums[-1].outputs[0], part]))
        _replace(graph, node, sums)


def _producer(node: ir.Node | None, index: int, kind: str) -> ir.Node | None:
    """What makes an input of a node, if it is of this kind."""
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    found = value.producer() if value is not None else None
    return found if found is not None and found.op_type == kind else None


def _integers(value: ir.Value | None) -> tuple[int, ...]:
    """The numbers of a constant; () of anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return () if tensor is None else tuple(int(each) for each in tensor.numpy().ravel())


def _slice(node: ir.Node) -> list[tuple[int, ...]]:
    """[starts, ends, axes, steps] of a Slice, () where one is left out; of any other node all are ()."""
    given = [_integers(value) for value in node.inputs[1:]] if node.op_type == "Slice" else []
    return [*given, (), (), (), ()][:4]


def _place(node: ir.Node) -> int:
    """Which place of the first axis a Slice takes; -1 of any other node."""
    starts, ends, axes, _ = _slice(node)
    return starts[0] if axes == (0,) and len(starts) == 1 and ends == (starts[0] + 1,) else -1


def _every_second(node: ir.Node, axis: int) -> tuple[int, Ranges] | None:
    """(where a Slice of every second number up to the end of an axis begins, what it takes of other axes); None of any other."""
    starts, ends, axes, steps = _slice(node)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return None
    ranges = {each: (start, end, step) for each, start, end, step in zip(axes, starts, ends, steps, strict=True)}
    start, end, step = ranges.pop(axis, (0, 0, 0))
    if step != 2 or end < _sizes(node.inputs[0])[axis] or any(each[2] != 1 for each in ranges.values()):
        return None
    return start, tuple((each, first, last) for each, (first, last, _) in sorted(ranges.items()))


def _sizes(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a value where it is known whole, else ()."""
    if value is None or value.shape is None:
        return ()
    sizes = tuple(size for size in value.shape if isinstance(size, int))
    return sizes if len(sizes) == len(value.shape) else ()


def _constant(graph: ir.Graph, node: ir.Node, array: NDArray[Any], what: str) -> ir.Value:
    """An initializer of a graph, named after the node that it is for."""
    value = ir.Value(name=f"{node.outputs[0].name}.{what}")
    value.const_value = ir.tensor(array, name=value.name)
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value] = ()) -> None:
    """Nodes in the place of one, whose values, or others in their place, are then those of the last."""
    for index, each in enumerate(nodes):
        each.name = f"{node.name}.{index}"
        for number, value in enumerate(each.outputs):
            value.name = f"{node.outputs[0].name}.{index}.{number}"
    graph.insert_before(node, nodes)
    for old, new in zip(outputs or node.outputs, nodes[-1].outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
