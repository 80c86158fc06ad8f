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

from toolchain.errors import ArtifactError
from toolchain.files import reading
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
    with reading(path):
        stored = path.read_bytes()
    if stored[4:8] != IDENTIFIER:
        raise ArtifactError(f"{path} is no .tflite file, or is truncated")
    try:
        return _read(schema, stored)
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError, struct.error) as error:
        raise ArtifactError(f"{path} is damaged, or is truncated: {error}") from error


def _read(schema: Any, stored: bytes) -> TfliteModel:
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(stored, 0))
    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    types = {
        number: TYPES.get(name, "") for name, number in vars(schema.TensorType).items() if not name.startswith("_")
    }
    operators = [
        code.customCode.decode() if code.customCode else names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        for code in model.operatorCodes or ()
    ]
    buffers = [_buffer(each, stored) for each in model.buffers or ()]
    graphs = tuple(_graph(each, buffers, operators, types) for each in model.subgraphs or ())
    metadata = {entry.name.decode(): buffers[entry.buffer] for entry in model.metadata or ()}
    return TfliteModel(
        graphs,
        tuple(_signature(each, graphs) for each in model.signatureDefs or ()),
        {name: b"" if data is None else data.tobytes() for name, data in metadata.items()},
    )


def _buffer(buffer: Any, stored: bytes) -> Array | None:
    """What a buffer holds, uint8; of large files it lies behind the message."""
    if buffer.offset > 1:
        if buffer.offset + buffer.size > len(stored):
            raise ValueError("a buffer ends behind the file")
        return np.frombuffer(stored, np.uint8, buffer.size, buffer.offset)
    data = _vector(buffer.data)
    return data if data.size else None


def _graph(graph: Any, buffers: list[Array | None], operators: list[str], types: dict[int, str]) -> Graph:
    nodes = (
        Node(operators[each.opcodeIndex], tuple(_vector(each.inputs).tolist()), tuple(_vector(each.outputs).tolist()))
        for each in graph.operators or ()
    )
    return Graph(tuple(_tensor(each, buffers, types) for each in graph.tensors or ()), tuple(nodes))


def _tensor(tensor: Any, buffers: list[Array | None], types: dict[int, str]) -> StoredTensor:
    shape = _vector(tensor.shapeSignature).tolist() or _vector(tensor.shape).tolist()
    how = tensor.quantization
    scales = _vector(None if how is None else how.scale)
    return StoredTensor(
        (tensor.name or b"").decode(),
        types[tensor.type],
        tuple(size if size >= 0 else None for size in shape),
        tensor.buffer,
        buffers[tensor.buffer],
        scales,
        how.quantizedDimension if scales.size else 0,
    )


def _signature(signature: Any, graphs: tuple[Graph, ...]) -> TfliteSignature:
    graph = graphs[signature.subgraphIndex]
    inputs, outputs = (
        {each.name.decode(): graph.tensors[each.tensorIndex] for each in side or ()}
        for side in (signature.inputs, signature.outputs)
    )
    return TfliteSignature(signature.signatureKey.decode(), graph, inputs, outputs)


def _vector(numbers: Any) -> Array:
    """The numbers of a vector, which may be left out."""
    return np.empty(0, np.float32) if numbers is None else np.asarray(numbers)
