"""Rewrites sums that pnnx converts wrongly or ncnn lacks: means, lengths, rotations, stacks, norms of one size."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from toolchain.artifacts.ncnn_format import LARGEST_RANK
from toolchain.targets.ncnn.nodes import constant, cut, integers, producer, ranges_of, replace, reshape, sizes_of


def mean_as_product(graph: ir.Graph) -> None:
    """Means over one axis, which pnnx converts without the axis: as a product over the last, as a mean over two for tokens."""
    for node in [node for node in graph if node.op_type == "ReduceMean" and len(node.inputs) > 1]:
        source, axes, sizes = node.inputs[0], integers(node.inputs[1]), sizes_of(node.inputs[0])
        if len(axes) != 1 or not sizes:
            continue
        axis, keepdims = axes[0] % len(sizes), node.attributes.get_int("keepdims", 1)
        if axis == len(sizes) - 1 and keepdims:
            column = constant(graph, node, np.full((sizes[-1], 1), 1 / sizes[-1], np.float32), "mean")
            replace(graph, node, [ir.node("MatMul", [source, column])])
        elif (axis, len(sizes), keepdims) == (1, 3, 0):
            apart = reshape(graph, node, source, [1, sizes[1], 1, sizes[2]], "shape")
            both = constant(graph, node, [1, 2], "axes")
            replace(graph, node, [apart, ir.node("ReduceMean", [apart.outputs[0], both], {"keepdims": 0})])


def length_as_product(graph: ir.Graph) -> None:
    """Lengths along the last of four axes, by which pnnx normalises three at most: roots of a product of squares."""
    for node in [node for node in graph if node.op_type == "ReduceL2" and len(node.inputs) > 1]:
        source, axes, sizes = node.inputs[0], integers(node.inputs[1]), sizes_of(node.inputs[0])
        last = len(sizes) == LARGEST_RANK and axes in ((-1,), (LARGEST_RANK - 1,))
        if last and node.attributes.get_int("keepdims", 1) == 1:
            squares = ir.node("Mul", [source, source])
            column = constant(graph, node, np.ones((sizes[-1], 1), np.float32), "ones")
            total = ir.node("MatMul", [squares.outputs[0], column])
            replace(graph, node, [squares, total, ir.node("Sqrt", [total.outputs[0]])])


def rotate_by_product(graph: ir.Graph) -> None:
    """Rotary positions of neighbours, (a, b) → (−b, a), by slices of every second number, which ncnn has not: as a product."""
    for node in [node for node in graph if node.op_type == "Reshape"]:
        joined = producer(node, 0, "Concat")
        left, right = (producer(joined, index, "Unsqueeze") for index in (0, 1))
        odd, even = producer(producer(left, 0, "Neg"), 0, "Slice"), producer(right, 0, "Slice")
        shape = sizes_of(node.outputs[0])
        if joined is None or odd is None or even is None or not shape or len(joined.inputs) != 2:
            continue
        *before, width = shape
        others, seconds = ranges_of(odd), ranges_of(even)
        first, second = others.pop(len(before), (0, 0, 0)), seconds.pop(len(before), (0, 0, 0))
        if (
            odd.inputs[0] is not even.inputs[0]
            or others != seconds
            or any(step != 1 for _, _, step in others.values())
            or (first[0], first[2], second[0], second[2]) != (1, 2, 0, 2)
            or min(first[1], second[1]) < width
            or sizes_of(odd.inputs[0])[-1] != width
            or sizes_of(joined.outputs[0]) != (*before, width // 2, 2)
            or joined.attributes.get_int("axis", 0) not in (-1, len(shape))
        ):
            continue
        source, nodes = odd.inputs[0], []
        if others:
            ranges = {axis: (start, end) for axis, (start, end, _) in others.items()}
            nodes.append(cut(graph, node, source, ranges, "part"))
            source = nodes[0].outputs[0]
        turn = np.zeros((width, width), np.float32)
        turn[range(1, width, 2), range(0, width, 2)] = -1
        turn[range(0, width, 2), range(1, width, 2)] = 1
        replace(graph, node, [*nodes, ir.node("MatMul", [source, constant(graph, node, turn, "turn")])])


def add_stacked(graph: ir.Graph) -> None:
    """Sums over tensors that were stacked, whose new axis pnnx takes for the batch: as additions."""
    for node in [node for node in graph if node.op_type == "ReduceSum" and len(node.inputs) > 1]:
        joined = producer(node, 0, "Concat")
        if joined is None or integers(node.inputs[1]) != (0,) or node.attributes.get_int("keepdims", 1) != 0:
            continue
        stacked = [producer(joined, index, "Unsqueeze") for index in range(len(joined.inputs))]
        parts = [each.inputs[0] for each in stacked if each is not None and integers(each.inputs[1]) == (0,)]
        if joined.attributes.get_int("axis", 1) != 0 or len(parts) != len(stacked):
            continue
        sums = [ir.node("Add", parts[:2])]
        for part in parts[2:]:
            sums.append(ir.node("Add", [sums[-1].outputs[0], part]))
        replace(graph, node, sums)


def norm_of_two(graph: ir.Graph) -> None:
    """Norms of instances of one size, which ncnn has for two: [B, C, N] as [B, C, N, 1]."""
    for node in [node for node in graph if node.op_type == "InstanceNormalization"]:
        sizes = sizes_of(node.inputs[0])
        if len(sizes) == 3:
            apart = reshape(graph, node, node.inputs[0], [*sizes, 1], "apart")
            norm = ir.node("InstanceNormalization", [apart.outputs[0], *node.inputs[1:]], dict(node.attributes))
            replace(graph, node, [apart, norm, reshape(graph, node, norm.outputs[0], sizes, "together")])
