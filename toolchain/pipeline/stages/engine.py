"""`engines/<target>/` and `engines/<target>.<precision>/`: engines of the files, compared where they can be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.export.engine import BuildEngine
from toolchain.model import Made, run_stage
from toolchain.pipeline.cell import builder
from toolchain.pipeline.folder import Written
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.pipeline.stages.export import onnx_path
from toolchain.recipe import EngineSection
from toolchain.report.record import Counts, EngineFacts
from toolchain.targets import get_target

DENSE = "dense"


@dataclass(frozen=True)
class Engine(RunStage[EngineFacts]):
    """The engine of a compressed file for one target; that of the fp32 file has no precision in its name.

    Where `precision` is `DENSE` it is that of the dense fp32 file: what others of a target are timed against that opens
    nothing else that a run has.
    """

    run: Run
    section: EngineSection
    target: str
    precision: str
    facts = EngineFacts

    @property
    def name(self) -> str:
        return f"engine-{self._label}"

    @property
    def inputs(self) -> Sequence[Any]:
        digest = open_artifact(self._source).sha256
        how = self.section.model_dump(mode="json", exclude={"targets"})  # others are no part of this one
        return [digest, how, *builder(self.target), self.run.job.source.digest]

    @property
    def entries(self) -> Iterable[object]:
        return (get_target(self.target),)

    def work(self, key: str) -> Made[Written, EngineFacts]:  # noqa: ARG002
        run, section = self.run, self.section
        source, folder = OnnxFile(self._source), run.root / "engines" / self._label
        stage = BuildEngine(section, self.target, folder, lambda built: run.judge.engine(source, built, section.batch))
        engine = run_stage(stage, source)
        built = engine.artifact
        artifact = open_artifact(built.path)
        held, interpreted = all(rung.verdict == "pass" for rung in engine.rungs), built.record.loaded != "pass"
        counts = run.judge.built(source, built, section.batch) if held and not interpreted else Counts()
        facts = EngineFacts(
            target=self.target,
            model="dense" if self.precision == DENSE else "compressed",
            precision=FP32 if self.precision == DENSE else self.precision,
            interpreted=held and interpreted,
            file=built.path.name,
            path=built.path.relative_to(run.root).as_posix(),
            bytes=artifact.size_bytes,
            download_bytes=artifact.download_bytes,
            compute_capabilities=built.record.compute_capabilities,
            matmul_dtypes=built.record.matmul_dtypes,
            attention_layers=built.record.attention_layers,
            fused_attention=built.record.fused_attention,
            **counts.model_dump(),
        )
        return Made((folder,), facts, engine.rungs)

    @property
    def _source(self) -> Path:
        dense = self.precision == DENSE
        return onnx_path(self.run.root, FP32, "dense") if dense else onnx_path(self.run.root, self.precision)

    @property
    def _label(self) -> str:
        return self.target if self.precision == FP32 else f"{self.target}.{self.precision}"
