"""Rewrites tensors of more than four dimensions, ncnn's limit: queries, keys and values, windows, patches, pairs of heads."""

from __future__ import annotations

import math

import onnx_ir as ir

from toolchain.artifacts.ncnn_format import LARGEST_RANK
from toolchain.artifacts.onnx_walk import only_reader
from toolchain.targets.ncnn.nodes import constant, cut, integers, producer, ranges_of, replace, reshape, sizes_of

UNBOUND = (2, 0, 3, 1, 4)
"""How timm brings queries, keys and values [B, N, 3, H, D] to the front, to unbind them."""


def split_attention(graph: ir.Graph) -> None:
    """Queries, keys and values that are unbound from [B, N, 3, H, D]: split from [B, 3·H, N, D]."""
    for turn in [node for node in graph if node.op_type == "Transpose"]:
        shaper, sizes = producer(turn, 0, "Reshape"), sizes_of(turn.inputs[0])
        if shaper is None or not sizes or tuple(turn.attributes.get_ints("perm", ())) != UNBOUND:
            continue
        batch, tokens, parts, heads, width = sizes
        slices = {ranges_of(use.node).get(0): use.node for use in turn.outputs[0].uses()}
        if slices.keys() != {(part, part + 1, 1) for part in range(parts)}:
            continue
        squeezes = [only_reader(slices[part, part + 1, 1].outputs[0]) for part in range(parts)]
        if any(each is None or each.op_type != "Squeeze" for each in squeezes):
            continue
        flat = reshape(graph, turn, shaper.inputs[0], [batch, tokens, parts * heads, width], "shape")
        turned = ir.node("Transpose", [flat.outputs[0]], {"perm": [0, 2, 1, 3]})
        equal = constant(graph, turn, [heads] * parts, "heads")
        split = ir.node("Split", [turned.outputs[0], equal], {"axis": 1}, num_outputs=parts)
        replace(graph, turn, [flat, turned, split], [each.outputs[0] for each in squeezes if each is not None])


def turn_in_steps(graph: ir.Graph) -> None:
    """Transposes between two reshapes: a step for each run of axes that moves, [a, b, c, d] → [a, c, b, d]."""
    for turn in [node for node in graph if node.op_type == "Transpose"]:
        shaper, sizes = producer(turn, 0, "Reshape"), sizes_of(turn.inputs[0])
        reader = only_reader(turn.outputs[0])
        result = sizes_of(reader.outputs[0]) if reader is not None and reader.op_type == "Reshape" else ()
        if shaper is None or reader is None or len(sizes) <= LARGEST_RANK or not result:
            continue
        nodes: list[ir.Node] = []
        value = shaper.inputs[0]
        order, wanted = [*range(len(sizes))], [*turn.attributes.get_ints("perm", ())]
        for place, axis in enumerate(wanted):
            if (begin := order.index(axis)) == place:
                continue
            end = begin + 1
            while order[begin : end + 1] == wanted[place : place + end + 1 - begin] and end < len(order):
                end += 1
            runs = order[:place], order[place:begin], order[begin:end], order[end:]
            step = reshape(graph, turn, value, [math.prod(sizes[each] for each in run) for run in runs], f"step{place}")
            nodes += [step, ir.node("Transpose", [step.outputs[0]], {"perm": [0, 2, 1, 3]})]
            order, value = [*runs[0], *runs[2], *runs[1], *runs[3]], nodes[-1].outputs[0]
        replace(graph, reader, [*nodes, reshape(graph, turn, value, result, "result")])


def take_by_slice(graph: ir.Graph) -> None:
    """One place of an axis of many, and every n-th number of an axis, which ncnn has not: as a part of [a, n, b]."""
    for node in [node for node in graph if node.op_type in ("Gather", "Slice")]:
        source, sizes, result = node.inputs[0], sizes_of(node.inputs[0]), sizes_of(node.outputs[0])
        if not sizes or not result:
            continue
        if node.op_type == "Gather":
            shaper, places = producer(node, 0, "Reshape"), integers(node.inputs[1])
            if shaper is None or len(places) != 1 or len(sizes) <= LARGEST_RANK or len(result) == len(sizes):
                continue
            axis = node.attributes.get_int("axis", 0) % len(sizes)
            source, step = shaper.inputs[0], sizes[axis]
            place = places[0] % step
        else:
            if len(ranges := ranges_of(node)) != 1:
                continue
            ((axis, (place, _, step)),) = ranges.items()
            if step < 2 or place not in range(step) or result[axis] * step != sizes[axis]:
                continue
        before = math.prod(sizes[:axis]) * sizes[axis] // step
        apart = reshape(graph, node, source, [1, before, step, math.prod(sizes[axis + 1 :])], "apart")
        taken = cut(graph, node, apart.outputs[0], {2: (place, place + 1)}, "taken")
        replace(graph, node, [apart, taken, reshape(graph, node, taken.outputs[0], result, "result")])


def add_without_batch(graph: ir.Graph) -> None:
    """Sums with a constant, around which a first size of 1 is put on and taken off: without it."""
    for node in [node for node in graph if node.op_type == "Add"]:
        shaper, reader = producer(node, 0, "Reshape"), only_reader(node.outputs[0])
        tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
        if shaper is None or reader is None or reader.op_type != "Reshape" or tensor is None:
            continue
        sizes = sizes_of(shaper.inputs[0])
        if len(sizes) != LARGEST_RANK or len(tensor.shape) != 1 + LARGEST_RANK:
            continue
        if sizes_of(node.outputs[0]) == (1, *sizes) and sizes_of(reader.outputs[0]) == sizes:
            without = constant(graph, node, tensor.numpy()[0], "constant")
            replace(graph, reader, [ir.node("Add", [shaper.inputs[0], without])])
