"""Tokens that an output selects are selected as early as the graph allows.

A classifier reads one token of its last block. As torch writes it, that block is computed for all tokens and then all but one
are dropped; only its keys and values need the others. A Gather commutes with whatever works on each token alone. So it moves
up, towards the inputs, past every node whose result nobody else reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from toolchain.artifacts.onnx_walk import linked, only_reader
from toolchain.export.large import with_shapes

Axes = Mapping[int, int]
"""Input of a node → the axis of it that is selected from in place of an axis of the output."""
Sizes = tuple[Any, ...]
"""A shape: numbers, and names of what is not fixed."""
NEW = "selection.new"
"""Marks a Gather that was made here."""


def selected_early(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph, equal as a function, in which each Gather that keeps less than it reads is as far up as it can be.

    The graph that is given comes back where none can move. Weights are taken over, wherever their bytes lie.
    """
    moved = linked(with_shapes(model))
    if not _step(moved.graph):
        return model
    while _step(moved.graph):
        pass
    for node in list(moved.graph):
        _slice(node, moved.graph)
    moved.graph.sort()
    result: onnx.ModelProto = ir.to_proto(moved)
    read = {name for node in result.graph.node for name in node.input}
    given = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = [given.get(tensor.name, tensor) for tensor in result.graph.initializer if tensor.name in read]
    del result.graph.initializer[:]
    result.graph.initializer.extend(tensors)
    return result


def _step(graph: ir.Graph) -> bool:
    """Whether any Gather of a graph was moved up by one node."""
    return any(_moved(node, graph) for node in list(graph) if node.op_type == "Gather")


def _moved(gather: ir.Node, graph: ir.Graph) -> bool:
    """Whether a Gather was moved from behind the node that it reads to before it.

    One with a scalar index removes its axis. It becomes one that keeps the axis, and a Squeeze stays in its place.
    """
    value, index, result = *gather.inputs, gather.outputs[0]
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type not in RULES or value.is_graph_output() or not only_reader(value):
        return False
    if index is None or index.const_value is None:
        return False
    if not all(each is None or each.shape is not None for each in (value, *node.inputs)):
        return False
    others = node.outputs[1:]
    if any(each.uses() or each.is_graph_output() for each in others):
        return False
    axis, kept = gather.attributes.get_int("axis", 0) % len(_sizes(value)), index.const_value.size
    size, flat = _sizes(value)[axis], len(index.const_value.shape)
    if not isinstance(size, int) or kept >= size or flat > 1 or (flat and result.is_graph_output()):
        return False
    if (axes := RULES[node.op_type](node, axis)) is None:
        return False
    if not flat:
        index = _constant(graph, [int(index.const_value.numpy())])
    for place, own in axes.items():
        node.replace_input_with(place, _selected(graph, node, place, index, own))
    if node.op_type == "Reshape" and (target := _target(node))[axis] > 0:
        target[axis] = kept
        node.replace_input_with(1, _constant(graph, target))
    value.shape = _resized(value, axis, kept)
    for other in others:
        other.shape = None
    if flat:
        result.replace_all_uses_with(value)
    else:
        squeeze = ir.node("Squeeze", [value, _constant(graph, [axis])], name=gather.name)
        only = squeeze.outputs[0]
        only.shape, only.type, only.name, result.name = result.shape, result.type, result.name, f"{result.name}.before"
        graph.insert_after(gather, squeeze)
        result.replace_all_uses_with(only, replace_graph_outputs=True)
    graph.remove(gather, safe=True)
    return True


def _slice(node: ir.Node, graph: ir.Graph) -> None:
    """Puts a Slice in place of a new Gather that keeps one place of an axis: a view to most runtimes, where a Gather is a look-up."""
    index = node.inputs[1] if NEW in node.meta else None
    if index is None or index.const_value is None or tuple(index.const_value.shape) != (1,):
        return
    first = int(index.const_value.numpy()[0])
    limits = first, first + 1 or np.iinfo(np.int64).max, node.attributes.get_int("axis", 0)
    part = ir.node("Slice", [node.inputs[0], *(_constant(graph, [number]) for number in limits)], name=node.name)
    old, new = node.outputs[0], part.outputs[0]
    new.shape, new.type, new.name, old.name = old.shape, old.type, old.name, f"{old.name}.before"
    graph.insert_before(node, part)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _selected(graph: ir.Graph, node: ir.Node, place: int, index: ir.Value, axis: int) -> ir.Value:
    """What a Gather selects from an input of a node: one that is there already, or a new one before the node."""
    value = node.inputs[place]
    assert value is not None  # RULES name inputs that are there
    for reader, at in value.uses():
        same = reader.op_type == "Gather" and at == 0 and reader.inputs[1] is index
        if same and reader.attributes.get_int("axis", 0) == axis:
            return reader.outputs[0]
    name = f"{value.name}.{axis}.{index.name}"
    gather = ir.node("Gather", [value, index], {"axis": axis}, name=name)
    gather.meta[NEW] = True
    selected = gather.outputs[0]
    selected.name, selected.type = name, value.type
    selected.shape = _resized(value, axis, index.const_value.size if index.const_value else 0)
    graph.insert_before(node, gather)
    return selected


def _constant(graph: ir.Graph, values: Sequence[int]) -> ir.Value:
    """The initializer of some integers, made where there is none."""
    name = "selection." + "_".join(map(str, values))
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.array(values, np.int64), name=name)))
    return graph.initializers[name]


def _sizes(value: ir.Value | None) -> Sizes:
    """The shape of a value that is known to have one."""
    return tuple(value.shape or ()) if value is not None else ()


def _resized(value: ir.Value, axis: int, size: int) -> ir.Shape:
    return ir.Shape([*_sizes(value)[:axis], size, *_sizes(value)[axis + 1 :]])


def _target(node: ir.Node) -> list[int]:
    """What a Reshape is asked for; all zeros where that is computed."""
    shape = node.inputs[1]
    if shape is None or shape.const_value is None:
        return [0] * len(_sizes(node.outputs[0]))
    return [int(size) for size in shape.const_value.numpy()]


def _each_number(node: ir.Node, axis: int) -> Axes | None:
    """A result depends on the inputs at its own place; inputs may be broadcast."""
    made, axes = _sizes(node.outputs[0]), {}
    for place, value in enumerate(node.inputs):
        own = axis - len(made) + len(_sizes(value))
        if own >= 0 and (size := _sizes(value)[own]) != 1:
            if size != made[axis]:
                return None
            axes[place] = own
    return axes


def _last_axes(node: ir.Node, axis: int) -> Axes | None:
    """What lies along the last axes is computed together, and nothing else."""
    rank = len(_sizes(node.outputs[0]))
    first = node.attributes.get_int("axis", -1) % rank
    return {0: axis} if axis < first and (node.op_type != "Softmax" or first == rank - 1) else None


def _product(node: ir.Node, axis: int) -> Axes | None:
    """Rows of a product are those of its left factor."""
    left, right = (len(_sizes(value)) for value in node.inputs)
    return {0: left - 2} if axis == len(_sizes(node.outputs[0])) - 2 and min(left, right) >= 2 else None


def _transposed(node: ir.Node, axis: int) -> Axes | None:
    order = node.attributes.get_ints("perm", ())
    return {0: order[axis]} if order else None


def _reshaped(node: ir.Node, axis: int) -> Axes | None:
    """An axis stays one where as many numbers lie behind each of its entries as before."""
    given, made = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    if 0 in _target(node):  # an axis of the input by its place, or a shape that is computed
        return None
    for own, size in enumerate(given):
        fixed = all(isinstance(each, int) for each in (*given[own:], *made[axis:]))
        if fixed and size == made[axis] and math.prod(given[own:]) == math.prod(made[axis:]):
            return {0: own}
    return None


RULES: Mapping[str, Callable[[ir.Node, int], Axes | None]] = {
    **dict.fromkeys(("Gelu", "Erf", "Tanh", "Sigmoid", "Relu", "Add", "Sub", "Mul", "Div"), _each_number),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "Softmax"), _last_axes),
    "MatMul": _product,
    "Transpose": _transposed,
    "Reshape": _reshaped,
}
"""Operator → (node, axis of its output) → where that axis is selected in its inputs; None where it cannot be."""
