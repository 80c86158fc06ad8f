"""Graphs with more weights than one protobuf message holds: the weights in a file beside, the graph alone in memory.

protobuf ends at 2 GiB, and already fails when it is asked how large such a message is.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, set_external_data, uses_external_data
from torch import nn

from toolchain.artifacts.onnx_bare import bare, described, without_weights

INLINE_LIMIT_BYTES = 1_800_000_000
"""Bytes of weights above which they are written to a second file, below protobuf's limit of 2 GiB."""
KEPT_BYTES = 1024
"""Tensors up to this size stay in the graph: shapes and axes are read from them."""


def is_large(size_bytes: int) -> bool:
    """Whether weights of that size go into a file of their own."""
    return size_bytes > INLINE_LIMIT_BYTES


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each counted once."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def stored_bytes(model: onnx.ModelProto, over: int = 0) -> int:
    """Bytes of those of a graph's initializers that have more than `over`, wherever they lie."""
    sizes = (
        (ExternalDataInfo(tensor).length or 0) if uses_external_data(tensor) else len(tensor.raw_data)
        for tensor in model.graph.initializer
    )
    return sum(size for size in sizes if size > over)


def detached(model: onnx.ModelProto, data: Path) -> onnx.ModelProto:
    """A copy of a graph whose large weights are in the new file `data`, which has to lie beside it.

    Nothing is copied in memory but the graph; the one that is given stays as it is.
    """
    result = without_weights(model)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) <= KEPT_BYTES:
                result.graph.initializer.append(tensor)
                continue
            reference = described(tensor)
            set_external_data(reference, data.name, offset=file.tell(), length=file.write(tensor.raw_data))
            reference.ClearField("raw_data")
            result.graph.initializer.append(reference)
    return result


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph without its large weights and with the shapes and types of all its values."""
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(bare(model))
    return inferred
