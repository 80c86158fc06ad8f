"""BuildEngine: an ONNX file → one engine per target, with what is known of it beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from toolchain.artifact import (
    ENGINE_FILES,
    EngineArtifact,
    OnnxArtifact,
    atomic_folder,
    check_replaceable,
    write_json,
)
from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.export.weights import linears
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions, EngineBuild, get_target

RECORD = "engine.json"
INT8 = "int8-qdq"
PRODUCTS = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", INT8: "INT8"}
"""Precision of a file → the type that a runtime must see in all its matrix products; in int8, in its int8 linears."""


def builds(target: str, precision: str) -> bool:
    """Whether files of a precision become engines of a target: int8 of TensorRT alone, to OpenVINO its ONNX file is one."""
    return precision in PRODUCTS and (precision != INT8 or not target.startswith("openvino"))


@dataclass(frozen=True)
class BuildEngine:
    """OnnxArtifact → EngineArtifact in a folder of its own, replaced whole.

    Attributes:
        section: [engine].
        target: name of the target.
        folder: where the engine and engine.json go.
    """

    section: EngineSection
    target: str
    folder: Path
    name: str = "engine"

    def requires(self, given: OnnxArtifact) -> None:
        """Raises StorageError for a missing file or a folder that is no engine's, RecipeError for a precision, TargetUnavailable."""
        if not given.path.is_file():
            raise StorageError(f"there is no ONNX file {given.path}")
        if given.precision and not builds(self.target, given.precision):
            known = ", ".join(name for name in PRODUCTS if builds(self.target, name))
            raise RecipeError(f"{given.path} is {given.precision}; engines of {self.target} are built from {known}")
        check_replaceable(self.folder, ENGINE_FILES)
        get_target(self.target).probe()

    def __call__(self, given: OnnxArtifact) -> EngineArtifact:
        """The engine and its facts."""
        section = self.section
        options = BuildOptions(
            section.batch,
            section.compute_capabilities,
            strip=section.strip,
            version_compatible=section.version_compatible,
            hardware_compatible=section.hardware_compatible,
        )
        with atomic_folder(self.folder, ENGINE_FILES) as partial:  # what is refused in the block replaces nothing
            built = get_target(self.target).build(given.path, partial, options)
            write_json(partial / RECORD, dict(built.facts))
            self._require_precision(given, built)
        return EngineArtifact(self.target, self.folder / built.path.name, built.facts)

    def _require_precision(self, given: OnnxArtifact, built: EngineBuild) -> None:
        """Raises ArtifactError if the engine multiplies in another type than the file says it has."""
        if not given.precision:
            return
        wanted = PRODUCTS[given.precision]
        found = built.facts.get("matmul_dtypes", {})
        right = set(found) == {wanted}
        if given.precision == INT8:  # attention and what gives the logits stay in floating point
            expected = sum(each.kind == TensorProto.INT8 for each in linears(onnx.load(given.path)))
            right = found.get(wanted, 0) == expected > 0 and set(found) <= {wanted, "FLOAT"}
        if not right:
            raise ArtifactError(
                f"{built.path.name} is no {given.precision} engine: its matrix products are {found}, expected {wanted}"
            )
        chosen = built.facts.get("inspected_products", {})
        if chosen and given.precision != "fp32" and (wanted not in chosen or (wanted != "INT8" and "FLOAT" in chosen)):
            raise ArtifactError(
                f"{built.path.name} is no {given.precision} engine: by the engine inspector its matrix products read {chosen}"
            )

    def ensures(self, given: OnnxArtifact, made: EngineArtifact) -> None:  # noqa: ARG002
        """Raises ArtifactError if no engine was written."""
        if not made.path.is_file() or made.path.stat().st_size == 0:
            raise ArtifactError(f"target {self.target} wrote no engine")
