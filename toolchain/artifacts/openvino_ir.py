"""OpenVINO's own format: a graph in XML, and the weights in a file of the same name that ends in .bin."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from toolchain.artifacts.base import Fact, Part, Reading, coarsest_of, layer_and_part, require_bytes
from toolchain.artifacts.engine import Engine
from toolchain.artifacts.inputs import Port
from toolchain.errors import ArtifactError, StorageError
from toolchain.files import reading

FLOATS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}
"""OpenVINO's floating types, and numpy's."""
PRECISIONS = {
    "u2": "int2",
    "i4": "int4",
    "u4": "int4",
    "nf4": "fp4",
    "f4e2m1": "fp4",
    "i8": "int8",
    "u8": "int8",
    "f8e4m3": "fp8",
    "f8e5m2": "fp8",
    "bf16": "bf16",
    "f16": "fp16",
    "f32": "fp32",
    "f64": "fp64",
}
"""Types of weights, coarsest first, and the precisions that they make."""
TYPES = {
    "boolean": "bool",
    **FLOATS,
    **{f"{sign}{bits}": f"{'u' if sign == 'u' else ''}int{bits}" for sign in "iu" for bits in (8, 16, 32, 64)},
}
"""OpenVINO's names of types, and numpy's."""


@dataclass(frozen=True)
class OpenVinoIr(Engine):
    """An .xml and its .bin, read without OpenVINO."""

    name: ClassVar[str] = "openvino-ir"
    word: ClassVar[str] = "OpenVINO model"
    patterns: ClassVar[tuple[str, ...]] = ("*.xml", "*.bin")

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Both files; raises StorageError where one is missing, ArtifactError where the weights are cut off."""
        both = (self.path.with_suffix(".bin"), self.path)
        for file in both:
            if not file.is_file():
                raise StorageError(f"there is no file {file}, which an OpenVINO model needs")
        ends = (int(each.get("offset", "0")) + int(each.get("size", "0")) for _, each in self._constants())
        end = max(ends, default=0)
        require_bytes(both[0], end, f"{self.path.name} reads {end:,} of it")
        return both

    @cached_property
    def graph(self) -> ET.Element:
        """The .xml."""
        try:
            with reading(self.path):
                root = ET.parse(self.path).getroot()  # noqa: S314 - a file that the user names, and expat expands no entities
        except ET.ParseError as error:
            raise ArtifactError(f"{self.path} is not an OpenVINO model, or is truncated: {error}") from error
        if root.tag != "net" or root.find("layers") is None:
            raise ArtifactError(f"{self.path} is not an OpenVINO model: it is XML of another kind")
        return root

    def _layers(self, kind: str = "") -> Iterator[ET.Element]:
        """The layers of the graph of one type, or all, those in subgraphs included."""
        return (layer for layer in self.graph.iter("layer") if kind in ("", layer.get("type")))

    @property
    def precision(self) -> Reading:
        """The coarsest type that its weights are stored in: what it computes in is for the target to say."""
        held = Counter(data.get("element_type", "") for _, data in self._constants() if len(_shape(data)) > 1)
        return coarsest_of(held, PRECISIONS)

    @property
    def params(self) -> int:
        """The numbers stored in its constants, without scalars and indices."""
        shapes = ((_shape(data), data.get("element_type")) for _, data in self._constants())
        return sum(math.prod(shape) for shape, kind in shapes if shape and kind in PRECISIONS)

    @property
    def fixed_scales(self) -> bool:
        return any(self._layers("FakeQuantize"))

    @property
    def nodes(self) -> int:
        """Its layers that compute something."""
        return sum(layer.get("type") not in ("Const", "Parameter", "Result") for layer in self._layers())

    @property
    def inputs(self) -> tuple[Port, ...]:
        ports = []
        for layer in self._ends("Parameter"):
            data, port = layer.find("data"), layer.find("output/port")
            if data is None:
                raise ArtifactError(f"{self.path} is damaged: input {layer.get('name')!r} says no shape")
            kind = TYPES.get(data.get("element_type", ""), "")
            names = "" if port is None else port.get("names", "")
            ports.append(Port(_called(layer, names), kind, tuple(n if n >= 0 else None for n in _shape(data))))
        return tuple(ports)

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs, as OpenVINO calls them; files of its earlier versions name what they are made by alone."""
        made = {
            (layer.get("id"), port.get("id")): port.get("names", "")
            for layer in self.graph.iterfind("layers/layer")
            for port in layer.iterfind("output/port")
        }
        edges = {each.get("to-layer"): each for each in self.graph.iterfind("edges/edge")}
        ports = []
        for layer in self._ends("Result"):
            port, edge = layer.find("input/port"), edges.get(layer.get("id"))
            dims = [] if port is None else [int(dim.text or -1) for dim in port.iter("dim")]
            names = "" if edge is None else made.get((edge.get("from-layer"), edge.get("from-port")), "")
            called = _called(layer, layer.get("output_names") or names)
            ports.append(Port(called, "", tuple(n if n >= 0 else None for n in dims)))
        return tuple(ports)

    def _ends(self, kind: str) -> Iterator[ET.Element]:
        """The layers of one type of the graph itself, which subgraphs have as well."""
        return (layer for layer in self.graph.iterfind("layers/layer") if layer.get("type") == kind)

    @property
    def parts(self) -> Counter[Part]:
        """(layer, part of it) → bytes of its constants; constants may share their bytes."""
        parts, seen = Counter[Part](), set[str]()
        for name, data in self._constants():
            if (offset := data.get("offset", "")) not in seen:
                seen.add(offset)
                parts[layer_and_part(name)] += int(data.get("size", "0"))
        weights, graph = (file.stat().st_size for file in self.files)
        parts["(graph)", "nodes and metadata"] += graph
        parts[f"(file {self.files[0].name})", "between tensors"] += weights - (parts.total() - graph)
        return parts

    def _constants(self) -> Iterator[tuple[str, ET.Element]]:
        """(the name that its output had in the model that it was made from, where it lies and what it is) of each constant."""
        for layer in self._layers("Const"):
            port, data = layer.find("output/port"), layer.find("data")
            if data is not None:
                names = "" if port is None else port.get("names", "")
                yield names.partition(",")[0] or layer.get("name", ""), data

    def facts(self) -> dict[str, Fact]:
        operators = Counter(layer.get("type", "") for layer in self._layers())
        return {
            **super().facts(),
            "params": self.params,
            **self.graph_facts(operators),
        }


def _called(layer: ET.Element, names: str) -> str:
    """What OpenVINO calls an input or output: the first of its names, of which a converter may write many or none, else the layer."""
    return min(filter(None, names.split(",")), default=layer.get("name", ""))


def _shape(data: ET.Element) -> tuple[int, ...]:
    """A shape as it is written, -1 for "?" and for ranges."""
    sizes = filter(None, data.get("shape", "").replace(" ", "").split(","))
    return tuple(int(size) if size.isdigit() else -1 for size in sizes)
