"""An ONNX file that is timed on a second runtime is compared there with its outputs on the first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.devices.device import Device
from toolchain.export.precision import reference_target
from toolchain.model import Made
from toolchain.parity import BATCHES, require
from toolchain.pipeline.cell import builder
from toolchain.pipeline.folder import Nothing, Written
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.targets import EngineBuild, get_target

PROFILE = (min(BATCHES), min(BATCHES), max(BATCHES))


@dataclass(frozen=True)
class Elsewhere(RunStage[Nothing]):
    """An ONNX file on a runtime that opens it as it is, against the same file where it was proven.

    Attributes:
        run: with the file.
        target: the runtime.
        path: of the file.
    """

    run: Run
    target: str
    path: Path
    facts = Nothing

    @property
    def name(self) -> str:
        return f"parity-{self.target}.{self.path.stem}"

    @property
    def inputs(self) -> Sequence[Any]:
        file = OnnxFile(self.path)
        return [file.sha256, *map(builder, (self.target, reference_target(file))), self.run.job.source.digest]

    @property
    def entries(self) -> Iterable[object]:
        return map(get_target, (self.target, reference_target(OnnxFile(self.path))))

    def work(self, key: str) -> Made[Written, Nothing]:  # noqa: ARG002
        built = EngineBuild(self.path, {"target": self.target})
        rung = self.run.judge.engine(OnnxFile(self.path), built, PROFILE)
        require([rung], f"Take what runs on {self.target} out of bench.targets")
        return Made((), Nothing(), (rung,))


def is_elsewhere(device: Device, path: Path) -> bool:
    """Whether a file is timed on this machine by another runtime than the one that its parity was proven on."""
    artifact = open_artifact(path)
    return device.is_here and isinstance(artifact, OnnxFile) and device.runtime != reference_target(artifact)
