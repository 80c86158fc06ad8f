"""An ONNX file, alone or with its weights in other files beside it, read without these."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from toolchain.artifacts.base import Artifact, Fact, Part, Reading, require_bytes
from toolchain.artifacts.inputs import Port
from toolchain.artifacts.onnx_layers import onnx_parts
from toolchain.artifacts.onnx_types import graph_precision
from toolchain.artifacts.onnx_walk import linked, quantisation
from toolchain.errors import ArtifactError, StorageError
from toolchain.files import reading
from toolchain.model import Preprocess
from toolchain.outputs import CLASSES, Output, output_named
from toolchain.outputs import OUTPUT as OUTPUT_KIND

PREPROCESS, PRECISION, FORM = "slimvit.preprocess", "slimvit.precision", "slimvit.input"
"""Keys of a file's metadata: how images become its input, its precision, and what its input is where that is no image."""
GRAPH_TYPE = "slimvit.precision.type"
"""Metadata key: the type that the graph rounds to, if the name of its precision does not begin with it."""
SHOWN = 5
"""How many class names `inspect` shows."""
UINT8 = "uint8 pixels [batch, H, W, C], 0…255, RGB or grey"
PROBABILITIES, SOFTMAX = "probabilities", "slimvit.softmax"
"""The output that slimvit adds on request, and the name of its node."""
FP32 = "fp32"
NOT_WEIGHTS = frozenset(
    {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}
)
"""Element types of initializers that are not weights: shapes, axes and indices."""
SQUASHES = ("Softmax", "Sigmoid")
"""Operators that change numbers and not their order."""
Kind = TypeVar("Kind", bound=Message)


@dataclass(frozen=True)
class Declaring(Artifact):
    """A file whose metadata says how images become its input, and what its outputs are."""

    @property
    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """Its metadata."""

    @cached_property
    def preprocess(self) -> Preprocess | None:
        """The preprocessing that it declares; None if slimvit did not write it."""
        if (declared := self.metadata.get(PREPROCESS)) is None:
            return None
        try:
            return Preprocess.from_dict(json.loads(declared))
        except (json.JSONDecodeError, ArtifactError) as error:
            raise ArtifactError(f"{self.path} has damaged metadata: {PREPROCESS}: {error}") from None

    @property
    def own_pixels(self) -> bool:
        """Whether it declares that it takes uint8 pixels as slimvit writes them."""
        return self.metadata.get(FORM) == UINT8

    @property
    def output(self) -> Output | None:
        """What it says that its outputs are; None where it does not, as classes need not be declared."""
        return output_named(self.metadata.get(OUTPUT_KIND))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names that it declares, in the order of the outputs; () if it declares none."""
        try:
            names = json.loads(self.metadata.get(CLASSES, "[]"))
        except json.JSONDecodeError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ArtifactError(f"{self.path} has damaged metadata: {CLASSES} is no list of names")
        return tuple(names)


@dataclass(frozen=True)
class OnnxFile(Declaring):
    """An ONNX file and the files that it keeps weights in."""

    name: ClassVar[str] = "onnx"
    word: ClassVar[str] = "ONNX file"
    patterns: ClassVar[tuple[str, ...]] = ("*.onnx", "*.onnx.data")

    @cached_property
    def model(self) -> onnx.ModelProto:
        """What is in the file; weights that lie in other files are not read."""
        try:
            with reading(self.path):
                model = onnx.load(self.path, load_external_data=False)
        except DecodeError as error:
            raise ArtifactError(f"{self.path} is not an ONNX file, or is truncated: {error}") from error
        if not all(isinstance(name, str) for name in _names(model.graph)):
            raise ArtifactError(f"{self.path} is damaged: a name in its graph is no text. Export or fetch it again.")
        if not model.graph.output:
            raise ArtifactError(f"{self.path} is not an ONNX file: its graph has no output")
        return model

    @cached_property
    def graph(self) -> ir.Graph:
        """Its graph as `linked` gives it."""
        return linked(self.model, str(self.path)).graph

    @cached_property
    def _external(self) -> dict[str, int]:
        """File that it keeps weights in → the bytes that it reads of it, from the first."""
        ends: dict[str, int] = {}
        for tensor in filter(uses_external_data, messages(self.model, onnx.TensorProto)):
            stored = ExternalDataInfo(tensor)
            ends[stored.location] = max(ends.get(stored.location, 0), (stored.offset or 0) + (stored.length or 0))
        return ends

    @property
    def needs(self) -> tuple[str, ...]:
        """The files that it keeps weights in."""
        return tuple(sorted(self._external))

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The file and its external data; raises ArtifactError where that is missing, too short or outside its folder."""
        if not self.path.is_file():
            raise StorageError(f"there is no file {self.path}")
        files = {self.path}
        for location, end in sorted(self._external.items()):
            file = self.path.parent / location  # which may be a link, as in the cache of a hub's client
            if Path(location).is_absolute() or ".." in Path(location).parts or not file.is_file():
                raise ArtifactError(
                    f"{self.path} needs its external data {location!r}, which is not in {self.path.parent}"
                )
            require_bytes(file, end, f"{self.path.name} reads {end:,} of it")
            files.add(file)
        return tuple(sorted(files))

    @property
    def params(self) -> int:
        """The numbers stored in its tensors, without scalars, indices, and the scales and zero points of quantised ones."""
        scales, codes = quantisation(self.model.graph)
        return sum(
            math.prod(t.dims)
            for t in messages(self.model, onnx.TensorProto)
            if t.dims and t.name not in scales and (t.data_type not in NOT_WEIGHTS or t.name in codes)
        )

    @property
    def nodes(self) -> int:
        return sum(1 for _ in messages(self.model, onnx.NodeProto))

    @cached_property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; older files list their weights among them, which are left out."""
        return tuple(_port(value) for value in self.graph.inputs if value.const_value is None)

    @cached_property
    def outputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self.graph.outputs))

    @property
    def metadata(self) -> dict[str, str]:
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @cached_property
    def precision(self) -> Reading:
        """The precision of its graph; metadata can only refine it, as "int8-qdq" refines the graph's "int8"."""
        name, reason = graph_precision(self.model, str(self.path))
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
        own = any(node.name == SOFTMAX for node in self.graph)
        return {name: rank for name, rank in super().ranks.items() if not (own and name == PROBABILITIES)}

    @cached_property
    def choices(self) -> dict[str, str]:
        """As of every artifact, and outputs that TopK sorted."""
        sorted_ = {
            value.name: "the largest numbers alone, sorted (TopK)" for value in self.graph.outputs if _is_sorted(value)
        }
        return {name: why for name, why in sorted_.items() if name in self.ranks} | super().choices

    @property
    def fixed_scales(self) -> bool:
        return any(n.op_type == "QuantizeLinear" or n.op_type.startswith("QLinear") for n in self.graph)

    @property
    def scales_by_call(self) -> bool:
        """Whether it rounds activations by scales that follow from all images of a call."""
        return any(n.op_type.startswith("DynamicQuantize") for n in self.graph)

    @property
    def parts(self) -> Counter[Part]:
        """(layer, part of it) → bytes; the graph itself is the layer "(graph)"."""
        sizes = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in self.files}
        return onnx_parts(self.graph, messages(self.model, onnx.TensorProto), self.path.name, sizes)

    def facts(self) -> dict[str, Fact]:
        operators, names = Counter(node.op_type for node in self.graph), self.class_names
        return {
            **super().facts(),
            "precision": str(self.precision),
            "params": self.params,
            "opset": {domain or "ai.onnx": version for domain, version in self.graph.opset_imports.items()},
            **self.graph_facts(operators),
            **({"classes": f"{len(names)}: {', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)}"} if names else {}),
            "metadata": {key: value for key, value in self.metadata.items() if key != CLASSES},
        }


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    """What nodes and values are called; protobuf gives bytes for what is no UTF-8."""
    for node in graph.node:
        yield from (
            node.op_type,
            node.domain,
            node.name,
            *node.input,
            *node.output,
            *(each.name for each in node.attribute),
        )
    for value in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        yield value.name


def _is_sorted(value: ir.Value) -> bool:
    """Whether a value comes from TopK, through nodes that change no order."""
    while (
        (node := value.producer()) is not None
        and node.op_type in ("Cast", "Identity", *SQUASHES)
        and node.inputs[0] is not None
    ):
        value = node.inputs[0]
    return node is not None and node.op_type == "TopK"


def _port(value: ir.Value) -> Port:
    name = value.dtype.numpy().name if value.dtype else ""
    sizes = [size if isinstance(size, int) else size.value for size in value.shape or ()]
    return Port(str(value.name), name, None if value.shape is None else tuple(size or None for size in sizes))


def messages(message: Message, kind: type[Kind]) -> Iterator[Kind]:
    """Every message of a kind in another: nodes and tensors, those in subgraphs, functions and sparse tensors as well."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for item in (value,) if isinstance(value, Message) else value:
            if isinstance(item, kind):
                yield item
            if not isinstance(item, onnx.TensorProto):  # in which there is nothing but numbers
                yield from messages(item, kind)
