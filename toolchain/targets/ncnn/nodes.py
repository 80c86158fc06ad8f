"""Helpers of the rewrites for pnnx: queries on a graph with known shapes, and replacement of a node by others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike


def producer(node: ir.Node | None, index: int, kind: str) -> ir.Node | None:
    """What makes an input of a node, if it is of this kind."""
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    found = value.producer() if value is not None else None
    return found if found is not None and found.op_type == kind else None


def integers(value: ir.Value | None) -> tuple[int, ...]:
    """The numbers of a constant; () of anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return () if tensor is None else tuple(int(each) for each in tensor.numpy().ravel())


def sizes_of(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a value where it is known whole, else ()."""
    if value is None or value.shape is None:
        return ()
    sizes = tuple(size for size in value.shape if isinstance(size, int))
    return sizes if len(sizes) == len(value.shape) else ()


def ranges_of(node: ir.Node | None) -> dict[int, tuple[int, int, int]]:
    """Axis → (start, end, step) of what a Slice takes a part of; {} of any other node, and where that is not known."""
    if node is None or node.op_type != "Slice" or not (rank := len(sizes_of(node.inputs[0]))):
        return {}
    starts, ends, axes, steps = [*(integers(value) for value in node.inputs[1:]), (), (), ()][:4]
    steps = steps or (1,) * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return {}
    return {axis % rank: (start, end, step) for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)}


def constant(graph: ir.Graph, node: ir.Node, numbers: ArrayLike, what: str) -> ir.Value:
    """An initializer of a graph, named after the node that it is for."""
    value = ir.Value(name=f"{node.outputs[0].name}.{what}")
    array = np.asarray(numbers)
    value.const_value = ir.tensor(array, name=value.name)
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
    graph.register_initializer(value)
    return value


def reshape(graph: ir.Graph, node: ir.Node, value: ir.Value | None, sizes: Sequence[int], what: str) -> ir.Node:
    """A value in another shape, for a node; `what` tells its constants apart."""
    return ir.node("Reshape", [value, constant(graph, node, sizes, what)])


def cut(
    graph: ir.Graph, node: ir.Node, value: ir.Value | None, ranges: dict[int, tuple[int, int]], what: str
) -> ir.Node:
    """What lies from a start to an end on some axes of a value, for a node."""
    starts, ends = zip(*ranges.values(), strict=True)
    given = {"starts": starts, "ends": ends, "axes": [*ranges]}
    return ir.node("Slice", [value, *(constant(graph, node, each, f"{what}.{name}") for name, each in given.items())])


def replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value] = ()) -> None:
    """Nodes in the place of one, whose values, or others in their place, are then those of the last."""
    for index, each in enumerate(nodes):
        each.name = f"{node.name}.{index}"
        for number, value in enumerate(each.outputs):
            value.name = f"{node.outputs[0].name}.{index}.{number}"
    graph.insert_before(node, nodes)
    for old, new in zip(outputs or node.outputs, nodes[-1].outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
