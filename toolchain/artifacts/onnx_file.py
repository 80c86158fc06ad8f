"""An ONNX file, alone or with its weights in other files beside it, read without these."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, get_args

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from toolchain.artifacts.base import Artifact, Fact, Part, Reading, port_facts
from toolchain.artifacts.inputs import Port
from toolchain.artifacts.onnx_layers import onnx_parts
from toolchain.artifacts.onnx_types import graph_precision
from toolchain.errors import ArtifactError, StorageError
from toolchain.model import Preprocess
from toolchain.outputs import OUTPUT as OUTPUT_KIND
from toolchain.outputs import Output

PREPROCESS, PRECISION, FORM = "slimvit.preprocess", "slimvit.precision", "slimvit.input"
"""Keys of a file's metadata: how images become its input, its precision, and what its input is where that is no image."""
GRAPH_TYPE = "slimvit.precision.type"
"""The type that its graph rounds to, where the name of its precision does not begin with that."""
UINT8 = "uint8 pixels [batch, H, W, C], 0…255, RGB or grey"
PROBABILITIES, SOFTMAX = "probabilities", "slimvit.softmax"
"""The output that slimvit adds on request, and the name of its node."""
FP32 = "fp32"
NOT_WEIGHTS = frozenset(
    {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
)
"""Shapes, axes and indices are stored like weights and are none."""


@dataclass(frozen=True)
class OnnxFile(Artifact):
    """An ONNX file and the files that it keeps weights in."""

    name: ClassVar[str] = "onnx"
    word: ClassVar[str] = "ONNX file"
    patterns: ClassVar[tuple[str, ...]] = ("*.onnx", "*.onnx.data")

    @cached_property
    def model(self) -> onnx.ModelProto:
        """What is in the file; weights that lie in other files are not read."""
        try:
            model = onnx.load(self.path, load_external_data=False)
        except OSError as error:
            raise StorageError(f"cannot read {self.path}: {error.strerror}") from error
        except DecodeError as error:
            raise ArtifactError(f"{self.path} is not an ONNX file, or is truncated: {error}") from error
        if not model.graph.output:
            raise ArtifactError(f"{self.path} is not an ONNX file: its graph has no output")
        return model

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file and its external data; raises ArtifactError where that is missing, too short or outside its folder."""
        if not self.path.is_file():
            raise StorageError(f"there is no file {self.path}")
        ends: dict[str, int] = {}
        for tensor in filter(uses_external_data, stored_tensors(self.model)):
            stored = ExternalDataInfo(tensor)
            ends[stored.location] = max(ends.get(stored.location, 0), (stored.offset or 0) + (stored.length or 0))
        files = {self.path}
        for location, end in sorted(ends.items()):
            file = self.path.parent / location
            if not file.resolve().is_relative_to(self.path.parent.resolve()) or not file.is_file():
                raise ArtifactError(
                    f"{self.path} needs its external data {location!r}, which is not in {self.path.parent}"
                )
            if (there := file.stat().st_size) < end:
                raise ArtifactError(
                    f"{file} has {there:,} bytes, and {self.path.name} reads {end:,} of it: it is truncated"
                )
            files.add(file)
        return tuple(sorted(files))

    @property
    def params(self) -> int:
        """The numbers stored in its tensors, without scalars and indices."""
        tensors = stored_tensors(self.model)
        return sum(math.prod(t.dims) for t in tensors if t.dims and t.data_type not in NOT_WEIGHTS)

    @property
    def nodes(self) -> int:
        """Its nodes, those in subgraphs and functions included."""
        return sum(1 for _ in all_nodes(self.model))

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; older files list their weights among them, which are left out."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        return tuple(_port(value) for value in self.model.graph.input if value.name not in weights)

    @cached_property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs."""
        return tuple(_port(value) for value in self.model.graph.output)

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @cached_property
    def preprocess(self) -> Preprocess | None:
        """What it says of how images become its input; None where slimvit did not write it."""
        if (declared := self.metadata.get(PREPROCESS)) is None:
            return None
        try:
            return Preprocess.from_dict(json.loads(declared))
        except (json.JSONDecodeError, ArtifactError) as error:
            raise ArtifactError(f"{self.path} has damaged metadata: {PREPROCESS}: {error}") from None

    @property
    def own_pixels(self) -> bool:
        """Whether it says that it takes slimvit's pixels."""
        return self.metadata.get(FORM) == UINT8

    @property
    def output(self) -> Output | None:
        """What it says that its outputs are; None where it does not, as classes need not be declared."""
        declared = self.metadata.get(OUTPUT_KIND)
        return next((kind for kind in get_args(Output) if kind == declared), None)

    @cached_property
    def precision(self) -> Reading:
        """That of its graph, which its metadata only names closer: "int8-qdq" says more than the graph's "int8"."""
        name, reason = graph_precision(self.model)
        declared = self.metadata.get(PRECISION, FP32 if PREPROCESS in self.metadata else "")
        if declared and name in ("", self.metadata.get(GRAPH_TYPE, declared.partition("-")[0])):
            return Reading(declared)
        return Reading(name, f"{reason}; its metadata says {declared}" if PRECISION in self.metadata else reason)

    @property
    def own_precision(self) -> str:
        """Its precision, "fp32" if it says none; "" of what slimvit did not write, or others changed since."""
        return super().own_precision if self.metadata.keys() & {PREPROCESS, PRECISION} else ""

    @cached_property
    def ranks(self) -> dict[str, int | None]:
        """Output of the model → its rank, without the probabilities that slimvit added: they follow from the logits."""
        own = any(node.name == SOFTMAX for node in self.model.graph.node)
        return {name: rank for name, rank in super().ranks.items() if not (own and name == PROBABILITIES)}

    @property
    def fixed_scales(self) -> bool:
        """Whether it rounds activations by scales that are stored."""
        return any(n.op_type == "QuantizeLinear" or n.op_type.startswith("QLinear") for n in self.model.graph.node)

    @property
    def parts(self) -> Counter[Part]:
        """(layer, part of it) → bytes; the graph itself is the layer "(graph)"."""
        sizes = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in self.files}
        return onnx_parts(self.model, stored_tensors(self.model), self.path.name, sizes)

    def facts(self) -> dict[str, Fact]:
        """What `inspect` shows."""
        operators = Counter(node.op_type for node in self.model.graph.node)
        return {
            **super().facts(),
            "precision": str(self.precision),
            "params": self.params,
            "opset": {entry.domain or "ai.onnx": entry.version for entry in self.model.opset_import},
            "inputs": port_facts(self.inputs),
            "outputs": port_facts(self.outputs),
            "nodes": dict(operators.most_common()),
            "metadata": self.metadata,
        }


def _port(value: onnx.ValueInfoProto) -> Port:
    kind = value.type.tensor_type
    try:
        name = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except KeyError:
        name = ""
    shape = tuple(dim.dim_value or dim.dim_param or None for dim in kind.shape.dim) if kind.HasField("shape") else None
    return Port(value.name, name, shape)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every one inside its nodes."""
    yield graph
    for node in graph.node:
        yield from _inner(node)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from graphs(inner)


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a file, those of subgraphs and functions included."""
    for graph in graphs(model.graph):
        yield from graph.node
    for node in (node for function in model.functions for node in function.node):
        yield node
        for graph in _inner(node):
            yield from graph.node


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor in a file: initializers, and constants in nodes, subgraphs and functions."""
    inside = (graph for function in model.functions for node in function.node for graph in _inner(node))
    for graph in (*graphs(model.graph), *inside):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in all_nodes(model):
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
