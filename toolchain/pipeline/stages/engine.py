"""`engines/<target>/` and `engines/<target>.<precision>/`: engines of the files, compared where they can be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.artifacts.size import artifact_sha256, download_bytes
from toolchain.export.engine import BuildEngine
from toolchain.export.precision import FP32
from toolchain.model import Made, OnnxArtifact, run_stage
from toolchain.pipeline.cell import runtime
from toolchain.pipeline.folder import Written
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.pipeline.stages.export import onnx_path
from toolchain.recipe import EngineSection
from toolchain.report.record import EngineFacts


@dataclass(frozen=True)
class Engine(RunStage[EngineFacts]):
    """The engine of a compressed file for one target; that of the fp32 file has no precision in its name."""

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
        digest = artifact_sha256(onnx_path(self.run.root, self.precision))
        return [digest, self.section.model_dump(mode="json"), runtime(self.target)]

    def work(self, key: str) -> Made[Written, EngineFacts]:  # noqa: ARG002
        run, section = self.run, self.section
        path, folder = onnx_path(run.root, self.precision), run.root / "engines" / self._label
        stage = BuildEngine(section, self.target, folder, lambda built: run.judge.engine(path, built, section.batch))
        engine = run_stage(stage, OnnxArtifact(path, self.precision, run.job.dense.preprocess))
        built = engine.artifact
        files = [file for file in sorted(folder.iterdir()) if file.suffix != ".json"]
        capabilities = built.facts.get("compute_capabilities")
        facts = EngineFacts(
            target=self.target,
            precision=self.precision,
            file=built.path.name,
            path=built.path.relative_to(run.root).as_posix(),
            bytes=sum(file.stat().st_size for file in files),
            download_bytes=sum(download_bytes(file) for file in files),
            compute_capabilities=None if capabilities is None else tuple(capabilities),
            matmul_dtypes=built.facts.get("matmul_dtypes"),
            attention_layers=built.facts.get("attention_layers"),
            fused_attention=built.facts.get("fused_attention"),
        )
        return Made((folder,), facts, engine.rungs)

    @property
    def _label(self) -> str:
        return self.target if self.precision == FP32 else f"{self.target}.{self.precision}"
