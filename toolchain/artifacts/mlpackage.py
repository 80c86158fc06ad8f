"""Core ML's package: a folder with a program, its weights in a file of their own, and Manifest.json, which names both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from toolchain.artifacts.base import Fact, Part, Reading, coarsest_of
from toolchain.artifacts.engine import Engine
from toolchain.artifacts.inputs import Port
from toolchain.artifacts.onnx_file import Declaring
from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.files import read_json, reading
from toolchain.quiet import quiet

MANIFEST = "Manifest.json"
INSTALL = "pip install 'slimvit[coreml]'"
PORTS = {65568: "float32", 65552: "float16", 65600: "float64", 131104: "int32"}
"""Core ML's codes of array types → numpy's names."""
STORED = {
    "INT4": ("int4", 4),
    "INT8": ("int8", 8),
    "UINT8": ("int8", 8),
    "FLOAT16": ("fp16", 16),
    "FLOAT32": ("fp32", 32),
}
"""MIL's types of weights, coarsest first: the precisions that they make, and their bits."""
SCALES = ("scale", "offset", "zero_point")
"""What MIL's operations call the numbers by which quantised weights are read."""


@dataclass(frozen=True)
class MlPackage(Declaring, Engine):
    """A folder NAME.mlpackage, read through coremltools' own format description."""

    name: ClassVar[str] = "mlpackage"
    word: ClassVar[str] = "Core ML package"
    patterns: ClassVar[tuple[str, ...]] = ("*.mlpackage",)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.suffix == ".mlpackage" and path.is_dir()

    @cached_property
    def model_path(self) -> Path:
        """The file of the program, which Manifest.json names; raises ArtifactError where it names none that is there."""
        manifest = read_json(self.path / MANIFEST)
        try:
            relative = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{self.path / MANIFEST} names no model: {error}") from error
        path = self.path / "Data" / str(relative)
        if not path.resolve().is_relative_to(self.path.resolve()) or not path.is_file():
            raise ArtifactError(f"{self.path} needs its model {relative!r}, which is not there")
        return path

    @cached_property
    def spec(self) -> Any:
        """The program as protobuf; raises ArtifactError where it is damaged, TargetUnavailable without coremltools."""
        try:
            with quiet("coremltools"):
                from coremltools.proto import Model_pb2
        except ImportError as error:
            raise TargetUnavailable(
                "coreml", f"{self.path} is read by coremltools, which is not installed", INSTALL
            ) from error
        spec = Model_pb2.Model()
        with reading(self.model_path):
            stored = self.model_path.read_bytes()
        try:
            spec.ParseFromString(stored)
        except Exception as error:  # protobuf's own, which has no public base
            raise ArtifactError(f"{self.path} is no Core ML model, or is truncated: {error}") from error
        if spec.WhichOneof("Type") != "mlProgram":
            raise ArtifactError(
                f"{self.path} is no ML program but a {spec.WhichOneof('Type')}; convert it for iOS 15 or newer"
            )
        return spec

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Its user-defined metadata (`creatorDefined` in the format)."""
        return dict(sorted(self.spec.description.metadata.userDefined.items()))

    @property
    def inputs(self) -> tuple[Port, ...]:
        return tuple(map(_port, self.spec.description.input))

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs, which have the shapes that the program gives them."""
        shapes = {
            output.name: tuple(int(each.constant.size) or None for each in output.type.tensorType.dimensions)
            for _, op in self._operations()
            for output in op.outputs
        }
        ports = map(_port, self.spec.description.output)
        return tuple(Port(port.name, port.type, port.shape or shapes.get(port.name)) for port in ports)

    @property
    def precision(self) -> Reading:
        """The coarsest type of its stored weights; Core ML computes in fp16 or finer for any of them."""
        held = Counter(kind for _, kind, shape, _ in self._weights(SCALES) if len(shape) > 1)
        return coarsest_of(held, {kind: precision for kind, (precision, _) in STORED.items()})

    @property
    def params(self) -> int:
        """The numbers stored in its weights, without scalars, indices, and the scales of quantised ones."""
        return sum(math.prod(shape) for _, kind, shape, _ in self._weights(SCALES) if shape and kind in STORED)

    @property
    def nodes(self) -> int:
        """Its operations that compute something."""
        return sum(op.type != "const" for _, op in self._operations())

    @property
    def notes(self) -> list[str]:
        """What has to be known of it where it runs on images: here it does not run."""
        return [
            *super().notes,
            f"{self.path.name} is interpreted in torch; these are not numbers of Core ML on a device.",
        ]

    @property
    def parts(self) -> Counter[Part]:
        """(weight, type) → bytes, by the names that the converter gave; constants of a few numbers are in the graph."""
        parts = Counter[Part]()
        stored = 0
        for name, kind, shape, in_file in self._weights():
            if in_file and kind in STORED:
                count = math.ceil(math.prod(shape) * STORED[kind][1] / 8)
                parts[name, kind.lower()] += count
                stored += count
        sizes = {file: file.stat().st_size for file in self.files}
        graph = sizes.pop(self.model_path)
        parts["(graph)", "nodes and metadata"] += graph
        manifest = sizes.pop(self.path / MANIFEST, 0)
        parts[f"(file {MANIFEST})", ""] += manifest
        parts["(weights)", "between tensors"] += sum(sizes.values()) - stored
        return parts

    def _operations(self) -> Iterator[tuple[str, Any]]:
        """(its name, operation) of every function."""
        for function in self.spec.mlProgram.functions.values():
            for block in function.block_specializations.values():
                for op in block.operations:
                    yield _text(op.attributes.get("name")) or (op.outputs[0].name if op.outputs else ""), op

    def _weights(self, without: Collection[str] = ()) -> Iterator[tuple[str, str, tuple[int, ...], bool]]:
        """(name, MIL's type, shape, whether it lies in the file of weights) of every constant tensor but some arguments."""
        for name, op in self._operations():
            values = [op.attributes["val"]] if op.type == "const" and "val" in op.attributes else []
            arguments = (argument for role, argument in op.inputs.items() if role not in without)
            bindings = (each for argument in arguments for each in argument.arguments)
            values += [each.value for each in bindings if each.WhichOneof("binding") == "value"]
            for value in values:
                if value.type.WhichOneof("type") == "tensorType":
                    tensor = value.type.tensorType
                    types = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
                    shape = tuple(int(each.constant.size) for each in tensor.dimensions)
                    yield name, types[tensor.dataType].name, shape, value.WhichOneof("value") == "blobFileValue"

    def facts(self) -> dict[str, Fact]:
        operators: Counter[str] = Counter(op.type for _, op in self._operations() if op.type != "const")
        return {
            **super().facts(),
            "params": self.params,
            "specification": int(self.spec.specificationVersion),
            **self.graph_facts(operators),
            "metadata": self.metadata,
        }


def _port(feature: Any) -> Port:
    array = feature.type.multiArrayType
    shape = tuple(int(each) or None for each in array.shape)
    return Port(feature.name, PORTS.get(array.dataType, ""), shape or None)


def _text(value: Any) -> str:
    """The string that an attribute holds, "" where it holds none."""
    values: Mapping[int, str] | Any = () if value is None else value.immediateValue.tensor.strings.values
    return str(values[0]) if len(values) else ""
