"""`onnx/compressed.<precision>.onnx`: the file in another precision, compared with the fp32 file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.errors import ArtifactError, ParityError
from toolchain.export.onnx_graph import data_beside
from toolchain.export.precision import PRECISIONS, Precision, runs_on
from toolchain.model import Made, run_stage
from toolchain.pipeline.cell import runtime
from toolchain.pipeline.folder import Written
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.pipeline.stages.export import FileFacts, file_facts, onnx_path, tool_versions
from toolchain.report.record import FileRow
from toolchain.targets import Target, get_target


@dataclass(frozen=True)
class Converted(RunStage[FileFacts]):
    """A file of another precision; one that is not the same model is an error if it is required, and refused if not."""

    run: Run
    precision: str
    required: bool
    facts = FileFacts

    @property
    def name(self) -> str:
        return f"onnx-{self.precision}"

    @property
    def inputs(self) -> Sequence[Any]:
        judging = runtime(runs_on(PRECISIONS[self.precision]))
        digest = OnnxFile(self._whole).sha256
        return [digest, self.precision, self.run.job.source.digest, tool_versions(), self.required, judging]

    @property
    def entries(self) -> Iterable[object]:
        return taking_part(self.precision)

    def work(self, key: str) -> Made[Written, FileFacts]:  # noqa: ARG002
        run, path = self.run, onnx_path(self.run.root, self.precision)
        try:
            file = run_stage(run.judge.convert(self.precision, path), OnnxFile(self._whole))
        except (ParityError, ArtifactError) as error:
            if self.required:
                raise
            for stale in (path, data_beside(path)):  # of an earlier run
                stale.unlink(missing_ok=True)
            name = path.relative_to(run.root).as_posix()
            row = FileRow(path=name, model="compressed", precision=self.precision, refused=str(error))
            return Made((), FileFacts(row=row))
        graph, target = file.facts.graph, file.facts.target
        counts = run.judge.graph(path, target)
        facts = file_facts(run, path, "compressed", self.precision, graph, counts, target)
        return Made(graph.files, facts, file.rungs)

    @property
    def _whole(self) -> Path:
        return onnx_path(self.run.root, FP32)


def taking_part(name: str) -> tuple[Precision, Target]:
    """A precision and the target that judges its files: entries of registries that a conversion depends on."""
    precision = PRECISIONS[name]
    return precision, get_target(runs_on(precision))
