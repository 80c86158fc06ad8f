"""BuildEngine: an ONNX file → one engine per target, with what is known of it beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolchain.artifact import (
    ENGINE_FILES,
    EngineArtifact,
    OnnxArtifact,
    atomic_folder,
    check_replaceable,
    write_json,
)
from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions, EngineBuild, get_target

RECORD = "engine.json"
PRODUCTS = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
"""Precision of a file → the type that TensorRT must see in all its matrix products."""


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
        if given.precision and given.precision not in PRODUCTS:
            raise RecipeError(f"{given.path} is {given.precision}; engines are built from {', '.join(PRODUCTS)}")
        check_replaceable(self.folder, ENGINE_FILES)
        get_target(self.target).probe()

    def __call__(self, given: OnnxArtifact) -> EngineArtifact:
        """The engine and its facts."""
        options = BuildOptions(self.section.batch, self.section.compute_capabilities)
        with atomic_folder(self.folder, ENGINE_FILES) as partial:  # what is refused in the block replaces nothing
            built = get_target(self.target).build(given.path, partial, options)
            write_json(partial / RECORD, dict(built.facts))
            self._require_precision(given, built)
        return EngineArtifact(self.target, self.folder / built.path.name, built.facts)

    def _require_precision(self, given: OnnxArtifact, built: EngineBuild) -> None:
        """Raises ArtifactError if the network multiplies in another type than the file says it has."""
        found, wanted = built.facts.get("matmul_dtypes", {}), PRODUCTS.get(given.precision)
        if given.precision and set(found) != {wanted}:
            raise ArtifactError(
                f"{built.path.name} is no {given.precision} engine: its matrix products are {found}, expected {wanted} alone"
            )

    def ensures(self, given: OnnxArtifact, made: EngineArtifact) -> None:  # noqa: ARG002
        """Raises ArtifactError if no engine was written."""
        if not made.path.is_file() or made.path.stat().st_size == 0:
            raise ArtifactError(f"target {self.target} wrote no engine")
