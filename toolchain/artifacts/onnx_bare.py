"""Copies of ONNX graphs without their weights, so that questions about the graph need not load them."""

from __future__ import annotations

import math
from typing import Any

import onnx
from onnx.external_data_helper import set_external_data

KEPT_NUMBERS = 128
"""Tensors of at most this many numbers stay in the graph: shapes and axes are read from them."""


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph in which large weights are only described."""
    result = without_weights(model)
    for tensor in model.graph.initializer:
        result.graph.initializer.append(tensor if math.prod(tensor.dims) <= KEPT_NUMBERS else described(tensor))
    return result


def described(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A tensor that says where it lies and does not hold it."""
    reference = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    reference.raw_data = b""
    set_external_data(reference, "elsewhere")
    return reference


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph with no initializer."""
    result = onnx.ModelProto()
    _copy_fields(model, result, but="graph")
    _copy_fields(model.graph, result.graph, but="initializer")
    return result


def _copy_fields(source: Any, target: Any, *, but: str) -> None:
    """Copies every field of a protobuf message that is set, except one."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif hasattr(value, "ListFields"):
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)
