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
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]
ALPHA = 0.5
LEAST = 1e-5
"""No channel is scaled by less: one that is always zero has no largest value."""


@dataclass(frozen=True)
class Norm:
    """A LayerNormalization all of whose readers are linears with weights of their own.

    Attributes:
        node: the normalization.
        readers: (the linear, the axis of its weight that runs over the channels).
    """

    node: onnx.NodeProto
    readers: tuple[tuple[onnx.NodeProto, int], ...]

    @property
    def output(self) -> str:
        """What it gives."""
        return str(self.node.output[0])


def norms(model: onnx.ModelProto) -> list[Norm]:
    """Every LayerNormalization of a graph that can be smoothed, in its order.

    Reshapes between it and a linear are looked through: they keep the channels last. Whatever else reads it, or a weight
    that several linears share, leaves it as it is.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    outputs = {value.name for value in model.graph.output}
    found = []
    for node in model.graph.node:
        if node.op_type != "LayerNormalization" or not all(name in weights for name in node.input[1:]):
            continue
        channels = weights[node.input[1]].dims[0]
        linears = list(_linears(node.output[0], readers, weights, outputs, channels))
        own = all(linear is not None and len(readers[linear[0].input[1]]) == 1 for linear in linears)
        if linears and own:
            found.append(Norm(node, tuple(linear for linear in linears if linear is not None)))
    return found


def _linears(
    name: str,
    readers: Mapping[str, list[onnx.NodeProto]],
    weights: Mapping[str, onnx.TensorProto],
    outputs: set[str],
    channels: int,
) -> Iterator[tuple[onnx.NodeProto, int] | None]:
    """What reads a value: linears, and None for each reader that is none."""
    if name in outputs:
        yield None
    for node in readers.get(name, []):
        if node.op_type == "Reshape" and node.input[0] == name and _keeps_last(weights.get(node.input[1]), channels):
            yield from _linears(node.output[0], readers, weights, outputs, channels)
        elif node.op_type in ("MatMul", "Gemm") and node.input[0] == name and node.input[1] in weights:
            turned = {a.name: a.i for a in node.attribute}
            axis = 1 if turned.get("transB") else 0
            dims = weights[node.input[1]].dims
            yield (node, axis) if len(dims) == 2 and dims[axis] == channels and not turned.get("transA") else None
        else:
            yield None


def _keeps_last(shape: onnx.TensorProto | None, channels: int) -> bool:
    return shape is not None and int(numpy_helper.to_array(shape)[-1]) == channels


def smoothing(model: onnx.ModelProto, largest: Mapping[str, Array], alpha: float = ALPHA) -> dict[str, Array]:
    """Output of a normalization → s of each of its channels [C].

    Args:
        model: fp32, its weights in the file.
        largest: output of a normalization → max|x| of each of its channels [C], over calibration images.
        alpha: how much of the difficulty goes to the weights, 0…1.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for norm in norms(model):
        rows = [np.abs(numpy_helper.to_array(weights[node.input[1]])).max(axis=1 - axis) for node, axis in norm.readers]
        heavy = np.maximum(np.max(rows, axis=0), LEAST)
        found[norm.output] = np.maximum(largest[norm.output], LEAST) ** alpha / heavy ** (1 - alpha)
    return found


def smoothed(model: onnx.ModelProto, scales: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy of a graph, equal as a function, whose normalizations give their channels divided by `scales`."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in result.graph.initializer}
    used = Counter(name for node in result.graph.node for name in node.input)
    for norm in norms(result):
        scale = scales[norm.output]
        for index, name in enumerate(list(norm.node.input)[1:], start=1):
            smooth = numpy_helper.to_array(weights[name]) / scale
            if used[name] == 1:
                weights[name].CopyFrom(_as(name, smooth))
            else:  # normalizations may share a tensor
                norm.node.input[index] = f"{name}.{norm.output}"
                result.graph.initializer.append(_as(norm.node.input[index], smooth))
        for node, axis in norm.readers:
            tensor = weights[node.input[1]]
            factor = scale[:, None] if axis == 0 else scale[None, :]
            tensor.CopyFrom(_as(tensor.name, numpy_helper.to_array(tensor) * factor))
    _drop_unread(result)
    return result


def _as(name: str, values: Array) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(values, dtype=np.float32), name)


def _drop_unread(model: onnx.ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
