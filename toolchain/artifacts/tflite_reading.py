"""Reads a .tflite file: graphs, tensors and their stored data, signatures and metadata."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import ArtifactError, StorageError, fault_words
from toolchain.foreign import imported

Array = NDArray[Any]
IDENTIFIER = b"TFL3"
"""Bytes 4 to 8 of every such file."""
TYPES = {
    "FLOAT64": "float64",
    "FLOAT32": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (2, 4, 8, 16, 32, 64)},
}
"""LiteRT's names of types, and numpy's."""
LINEARS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
"""Operators whose second input is a weight."""
DEQUANTIZE = "DEQUANTIZE"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a graph.

    Attributes:
        name: as the file has it.
        type: numpy's name of its element type; "" of others.
        shape: None where a dimension is open.
        buffer: what is stored of it; tensors of several graphs share one.
        data: its bytes, uint8; None where nothing is stored.
        scales: of its quantisation, float32; none where it has none.
        axis: along which these lie.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]
    buffer: int
    data: Array | None
    scales: Array
    axis: int

    @property
    def values(self) -> Array:
        """What is stored, in its type and shape; raises ArtifactError where nothing is, or of types of less than a byte."""
        if self.data is None or self.type not in np.sctypeDict:
            raise ArtifactError(f"the values of tensor {self.name!r} cannot be read")
        return self.data.view(self.type).reshape([size or 0 for size in self.shape])


@dataclass(frozen=True)
class Node:
    """One operator of a graph: LiteRT's name of it, and the positions of its tensors, -1 for inputs that were left out."""

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """One graph of a file."""

    tensors: tuple[StoredTensor, ...]
    nodes: tuple[Node, ...]

    @cached_property
    def makers(self) -> dict[int, Node]:
        """Position of a tensor → the node that gives it."""
        return {output: node for node in self.nodes for output in node.outputs}

    def weight(self, node: Node) -> StoredTensor | None:
        """The stored weight of a linear or convolution, also where it is widened before; None of other nodes."""
        if node.op not in LINEARS:
            return None
        tensor, maker = self.tensors[node.inputs[1]], self.makers.get(node.inputs[1])
        if maker is not None and maker.op == DEQUANTIZE:
            tensor = self.tensors[maker.inputs[0]]
        return None if tensor.data is None else tensor


@dataclass(frozen=True)
class TfliteSignature:
    """What can be called: a graph, and its tensors by name."""

    key: str
    graph: Graph
    inputs: dict[str, StoredTensor]
    outputs: dict[str, StoredTensor]


@dataclass(frozen=True)
class TfliteModel:
    """A file.

    Attributes:
        signatures: in its order.
        graphs: all of them.
        metadata: name → what is stored under it.
    """

    graphs: tuple[Graph, ...]
    signatures: tuple[TfliteSignature, ...]
    metadata: dict[str, bytes]

    @property
    def stored(self) -> Iterator[StoredTensor]:
        """The tensors with stored data; tensors that share a buffer count once."""
        seen = set[int]()
        for graph in self.graphs:
            for tensor in graph.tensors:
                if tensor.data is not None and tensor.buffer not in seen:
                    seen.add(tensor.buffer)
                    yield tensor


def read_tflite(path: Path) -> TfliteModel:
    """Reads a .tflite file.

    Raises:
        StorageError: it cannot be read.
        ArtifactError: it is no such file, or is damaged.
        TargetUnavailable: the schema is missing, which comes with the runtime.
    """
    schema = imported("ai_edge_litert.schema_py_generated", "litert-cpu", "pip install 'slimvit[litert]'")
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {fault_words(error)}") from error
    if stored[4:8] != IDENTIFIER:
        raise ArtifactError(f"{path} is no .tflite file, or is truncated")
    try:
        return _read(schema, stored)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError, struct.error) as error:
        raise ArtifactError(f"{path} is damaged, or is truncated: {error}") from error


def _read(schema: Any, stored: bytes) -> TfliteModel:
    model = schema.Model.GetRootAs(stored, 0)
    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    types = {
        number: TYPES.get(name, "") for name, number in vars(schema.TensorType).items() if not name.startswith("_")
    }
    codes = [model.OperatorCodes(index) for index in range(model.OperatorCodesLength())]
    operators = [
        code.CustomCode().decode()
        if code.CustomCode()
        else names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        for code in codes
    ]
    buffers = [_buffer(model.Buffers(index), stored) for index in range(model.BuffersLength())]
    graphs = tuple(
        _graph(model.Subgraphs(index), buffers, operators, types) for index in range(model.SubgraphsLength())
    )
    entries = [model.Metadata(index) for index in range(model.MetadataLength())]
    metadata = {entry.Name().decode(): buffers[entry.Buffer()] for entry in entries}
    return TfliteModel(
        graphs,
        tuple(_signature(model.SignatureDefs(index), graphs) for index in range(model.SignatureDefsLength())),
        {name: b"" if data is None else data.tobytes() for name, data in metadata.items()},
    )


def _buffer(buffer: Any, stored: bytes) -> Array | None:
    """What a buffer holds, uint8; of large files it lies behind the message."""
    if buffer.Offset() > 1:
        if buffer.Offset() + buffer.Size() > len(stored):
            raise ValueError("a buffer ends behind the file")
        return np.frombuffer(stored, np.uint8, buffer.Size(), buffer.Offset())
    return None if not buffer.DataLength() else np.asarray(buffer.DataAsNumpy())


def _graph(graph: Any, buffers: list[Array | None], operators: list[str], types: dict[int, str]) -> Graph:
    tensors = tuple(_tensor(graph.Tensors(index), buffers, types) for index in range(graph.TensorsLength()))
    nodes = [graph.Operators(index) for index in range(graph.OperatorsLength())]
    return Graph(
        tensors,
        tuple(
            Node(
                operators[node.OpcodeIndex()],
                tuple(node.Inputs(index) for index in range(node.InputsLength())),
                tuple(node.Outputs(index) for index in range(node.OutputsLength())),
            )
            for node in nodes
        ),
    )


def _tensor(tensor: Any, buffers: list[Array | None], types: dict[int, str]) -> StoredTensor:
    signature = [tensor.ShapeSignature(index) for index in range(tensor.ShapeSignatureLength())]
    shape = signature or [tensor.Shape(index) for index in range(tensor.ShapeLength())]
    how = tensor.Quantization()
    scaled = how is not None and how.ScaleLength()
    return StoredTensor(
        (tensor.Name() or b"").decode(),
        types[tensor.Type()],
        tuple(size if size >= 0 else None for size in shape),
        tensor.Buffer(),
        buffers[tensor.Buffer()],
        np.asarray(how.ScaleAsNumpy()) if scaled else np.empty(0, np.float32),
        how.QuantizedDimension() if scaled else 0,
    )


def _signature(signature: Any, graphs: tuple[Graph, ...]) -> TfliteSignature:
    graph = graphs[signature.SubgraphIndex()]
    inputs = [signature.Inputs(index) for index in range(signature.InputsLength())]
    outputs = [signature.Outputs(index) for index in range(signature.OutputsLength())]
    sides = [{each.Name().decode(): graph.tensors[each.TensorIndex()] for each in side} for side in (inputs, outputs)]
    return TfliteSignature(signature.SignatureKey().decode(), graph, *sides)
