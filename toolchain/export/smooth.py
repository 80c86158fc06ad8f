"""SmoothQuant on a graph: what LayerNorms give is scaled down where it is large, and the next weights are scaled up.

Int8 has one scale for a whole activation; a few large channels would leave all others a handful of values. Per channel,
s_j = max|x_j|^α / max|W_j|^(1 − α), γ_j and β_j are divided by s_j, row j of every reading weight is multiplied: the same
function, up to fp32 rounding. Source: SmoothQuant, arXiv 2211.10438, equations 3 and 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from toolchain.artifacts.onnx_plain import copied
from toolchain.artifacts.onnx_walk import linked

Array = NDArray[Any]
ALPHA = 0.5
LEAST = 1e-5
"""Least scale of a channel: one that is always zero has none of its own."""


@dataclass(frozen=True)
class Norm:
    """A LayerNormalization all of whose readers are linears with weights of their own.

    Attributes:
        output: what it gives.
        parameters: its γ, and its β if it has one.
        readers: (what a linear reads, its weight, the axis of that which runs over the channels).
    """

    output: str
    parameters: tuple[str, ...]
    readers: tuple[tuple[str, str, int], ...]


def norms(model: onnx.ModelProto) -> list[Norm]:
    """Every LayerNormalization of a graph that can be smoothed, in its order.

    Reshapes between it and a linear are looked through: they keep the channels last. Whatever else reads it, or a weight
    that several linears share, leaves it as it is.
    """
    smooth = []
    for node in linked(model).graph:
        parameters = [value for value in node.inputs[1:] if value is not None and value.const_value is not None]
        if node.op_type != "LayerNormalization" or len(parameters) < len(node.inputs) - 1:
            continue
        readers = list(_readers(node.outputs[0], parameters[0]))
        if readers and None not in readers:
            names = tuple(str(value.name) for value in parameters)
            smooth.append(Norm(str(node.outputs[0].name), names, tuple(filter(None, readers))))
    return smooth


def _readers(value: ir.Value, gamma: ir.Value) -> Iterator[tuple[str, str, int] | None]:
    """What reads a value: linears with weights of their own, and None for each reader that is none."""
    if value.is_graph_output():
        yield None
    for node, index in value.uses():
        weight = node.inputs[1] if index == 0 and len(node.inputs) > 1 else None
        if weight is None or weight.const_value is None:
            yield None
        elif node.op_type == "Reshape" and (weight.const_value.numpy()[-1],) == gamma.shape:
            yield from _readers(node.outputs[0], gamma)
        else:
            axis = node.attributes.get_int("transB", 0)
            plain = node.op_type in ("MatMul", "Gemm") and not node.attributes.get_int("transA", 0)
            own = len(weight.uses()) == 1 and len(weight.const_value.shape) == 2
            fits = plain and own and (weight.const_value.shape[axis],) == gamma.shape
            yield (str(value.name), str(weight.name), axis) if fits else None


def smoothing(model: onnx.ModelProto, largest: Mapping[str, Array]) -> dict[str, Array]:
    """Output of a normalization → s of each of its channels [C].

    Args:
        model: fp32, its weights in the file.
        largest: output of a normalization → max|x| of each of its channels [C], over calibration images.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for norm in norms(model):
        rows = [np.abs(numpy_helper.to_array(weights[name])).max(axis=1 - axis) for _, name, axis in norm.readers]
        heavy = np.maximum(np.max(rows, axis=0), LEAST)
        found[norm.output] = np.maximum(largest[norm.output], LEAST) ** ALPHA / heavy ** (1 - ALPHA)
    return found


def smoothed(model: onnx.ModelProto, scales: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy of a graph, equal as a function, whose normalizations give their channels divided by `scales`."""
    result = copied(model)
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    nodes = {node.output[0]: node for node in result.graph.node}
    used = Counter(name for node in result.graph.node for name in node.input)
    for norm in norms(result):
        scale = scales[norm.output]
        for index, name in enumerate(norm.parameters, start=1):
            smooth = numpy_helper.to_array(weights[name]) / scale
            if used[name] == 1:
                weights[name].CopyFrom(_as(name, smooth))
            else:  # normalizations may share a tensor
                nodes[norm.output].input[index] = f"{name}.{norm.output}"
                result.graph.initializer.append(_as(f"{name}.{norm.output}", smooth))
        for _, name, axis in norm.readers:
            factor = scale[:, None] if axis == 0 else scale[None, :]
            weights[name].CopyFrom(_as(name, numpy_helper.to_array(weights[name]) * factor))
    _drop_unread(result)
    return result


def _as(name: str, values: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)


def _drop_unread(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
