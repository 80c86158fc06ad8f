"""BuildEngine: an ONNX file → one engine per target, with what is known of it beside it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from toolchain.artifact import EngineArtifact, OnnxArtifact, write_json
from toolchain.errors import ArtifactError
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions, get_target

RECORD = "engine.json"


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
        """Raises TargetUnavailable or ArtifactError if the target or the file is not there."""
        get_target(self.target).probe()
        if not given.path.is_file():
            raise ArtifactError(f"there is no ONNX file {given.path}")

    def __call__(self, given: OnnxArtifact) -> EngineArtifact:
        """The engine and its facts."""
        shutil.rmtree(self.folder, ignore_errors=True)
        options = BuildOptions(self.section.batch, self.section.compute_capabilities)
        built = get_target(self.target).build(given.path, self.folder, options)
        write_json(self.folder / RECORD, dict(built.facts))
        return EngineArtifact(self.target, built.path, built.facts)

    def ensures(self, given: OnnxArtifact, made: EngineArtifact) -> None:  # noqa: ARG002
        """Raises ArtifactError if no engine was written."""
        if not made.path.is_file() or made.path.stat().st_size == 0:
            raise ArtifactError(f"target {self.target} wrote no engine")
