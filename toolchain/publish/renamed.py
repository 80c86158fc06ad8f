"""An ONNX file with other names for its inputs and outputs, and nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx.external_data_helper import uses_external_data

from toolchain.artifacts.onnx_file import messages
from toolchain.artifacts.onnx_plain import copied
from toolchain.errors import ArtifactError


def renamed(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """A copy of a graph in which some values are called otherwise; renamed back it is the graph that was given, bit for bit.

    Args:
        model: the graph; weights that lie in other files are not touched.
        names: what a value is called → what it is to be called.

    Raises:
        ArtifactError: a name is taken by another value already, or is not the graph's.
    """
    result = _replaced(model, names)
    back = _replaced(result, {new: old for old, new in names.items()})
    if back.SerializeToString(deterministic=True) != model.SerializeToString(deterministic=True):
        clash = ", ".join(new for old, new in names.items() if new != old)
        raise ArtifactError(f"the values of the graph cannot be renamed to {clash}: a value has such a name already")
    missing = set(names) - _values(model)
    if missing:
        raise ArtifactError(f"the graph has no value {', '.join(sorted(missing))}")
    return result


def referring_to(model: onnx.ModelProto, data: str) -> onnx.ModelProto:
    """A copy of a graph whose weights in other files lie in the file `data` beside it."""
    result = copied(model)
    for tensor in filter(uses_external_data, messages(result, onnx.TensorProto)):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data
    return result


def _replaced(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    result = copied(model)
    for node in messages(result, onnx.NodeProto):
        for listed in (node.input, node.output):
            for index, name in enumerate(listed):
                listed[index] = names.get(name, name)
    for value in messages(result, onnx.ValueInfoProto):
        value.name = names.get(value.name, value.name)
    for tensor in result.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return result


def _values(model: onnx.ModelProto) -> set[str]:
    return {name for node in messages(model, onnx.NodeProto) for name in (*node.input, *node.output)}
