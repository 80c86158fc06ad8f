"""`onnx/<which>.fp32.onnx`: the dense and the deploy model as files, read back and compared with the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import FP32
from toolchain.export.onnx_graph import GraphFacts
from toolchain.export.stage import Export
from toolchain.files import sha256
from toolchain.model import DeployModel, Made, TimmModel, run_stage
from toolchain.pipeline.folder import Written
from toolchain.pipeline.stages.base import Run, RunStage, open_as
from toolchain.pipeline.stages.deploy import WEIGHTS_AND_RECORD
from toolchain.records import Record
from toolchain.report.record import Counts, FileRow, Graph
from toolchain.version import tool

GRAPH_TOOLS = ("onnx", "onnxscript", "onnxsim", "onnxruntime", "ml_dtypes")
Which = Literal["dense", "compressed"]


class FileFacts(Record):
    """An ONNX file: its row, what is in it, and layer → bytes; only the row of one that was refused."""

    row: FileRow
    graph: Graph | None = None
    layers: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class Exported(RunStage[FileFacts]):
    """The fp32 file of the dense or the compressed model."""

    run: Run
    which: Which
    facts = FileFacts

    @property
    def name(self) -> str:
        return f"onnx-{self.which}"

    @property
    def inputs(self) -> Sequence[Any]:
        job = self.run.job
        return [
            [sha256(self._model / file) for file in WEIGHTS_AND_RECORD],
            job.recipe.export.model_dump(mode="json", include={"opset", "simplify", "preprocess", "softmax"}),
            job.source.digest,
            tool_versions(),
        ]

    def work(self, key: str) -> Made[Written, FileFacts]:  # noqa: ARG002
        judge, path = self.run.judge, onnx_path(self.run.root, FP32, self.which)
        dense = self.which == "dense"
        model = open_as(self._model, TimmModel) if dense else open_as(self._model, DeployModel)
        stage = Export(self.run.job.recipe.export, path, judge.images(), judge.names_classes, tool())
        file = run_stage(stage, model)
        facts = file_facts(self.run, path, self.which, FP32, file.facts, judge.graph(path), "ort-cpu")
        return Made(file.facts.files, facts, file.rungs)

    @property
    def _model(self) -> Path:
        return self.run.root / ("dense" if self.which == "dense" else "deploy")


def file_facts(
    run: Run, path: Path, which: Which, precision: str, graph: GraphFacts, counts: Counts, judged_on: str
) -> FileFacts:
    """The facts of a file that is there."""
    artifact = open_artifact(path)
    row = FileRow(
        path=path.relative_to(run.root).as_posix(),
        model=which,
        precision=precision,
        bytes=graph.size_bytes,
        download_bytes=artifact.download_bytes,
        judged_on=judged_on,
        **counts.model_dump(),
    )
    census = Graph(
        size_bytes=graph.size_bytes,
        opset=graph.opset,
        nodes_before=dict(graph.nodes_before),
        nodes_after=dict(graph.nodes_after),
        simplified=graph.simplified,
        notes=graph.notes,
    )
    return FileFacts(row=row, graph=census, layers=artifact.layers)


def tool_versions() -> list[str]:
    """Versions of everything that writes a graph."""
    return [version(name) for name in GRAPH_TOOLS]


def onnx_path(root: Path, precision: str, which: Which = "compressed") -> Path:
    """Where the ONNX file of one precision lies in a run's folder."""
    return root / "onnx" / f"{which}.{precision}.onnx"
