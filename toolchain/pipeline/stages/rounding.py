"""Bytes and damage of each precision, measured on the dense model's file before widths are chosen.

Both are measured on the dense model's own file, converted as the compressed one's will be. Bytes that no width changes, the graph
above all, are the same in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.compress.closed_form import likelihood_for
from toolchain.cost import FileCost
from toolchain.errors import ArtifactError, BudgetError, ParityError
from toolchain.export.calls import opened, tensor_call
from toolchain.export.precision import PRECISIONS, file_cost, runs_on
from toolchain.export.scratch import folder_beside
from toolchain.export.stage import Export
from toolchain.files import sha256
from toolchain.likelihood import divergence_by_image, outputs_of
from toolchain.model import Made, TimmModel, run_stage
from toolchain.pipeline.cell import runtime
from toolchain.pipeline.folder import Written
from toolchain.pipeline.job import Job
from toolchain.pipeline.judge import Judge
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.pipeline.stages.convert import taking_part
from toolchain.pipeline.stages.export import onnx_path, tool_versions
from toolchain.records import Record
from toolchain.version import tool

IMAGES = 128
"""Held-out images that the damage of rounding is measured on, at most."""


class RoundingFacts(Record):
    """The dense model's file in a precision.

    Attributes:
        bytes: of the file; None where it is not the model.
        damage: mean KL divergence of its outputs from the dense model's, in nats an image; None on noise.
        whole: linears that keep a finer type.
        refused: why it is not the model.
    """

    precision: str
    bytes: int | None
    damage: float | None
    whole: tuple[str, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Rounded(RunStage[RoundingFacts]):
    """One precision of those whose files the budget limits; the dense fp32 file lies in the run's folder."""

    run: Run
    dense: TimmModel
    precision: str
    facts = RoundingFacts

    @property
    def name(self) -> str:
        return f"rounding-{self.precision}"

    @property
    def inputs(self) -> Sequence[Any]:
        judging = None if self.precision == FP32 else runtime(runs_on(PRECISIONS[self.precision]))
        return [sha256(self._file), self.precision, self.run.job.source.digest, tool_versions(), judging]

    @property
    def entries(self) -> Iterable[object]:
        return () if self.precision == FP32 else taking_part(self.precision)

    def work(self, key: str) -> Made[Written, RoundingFacts]:  # noqa: ARG002
        return Made((), rounding(self.run.judge, self.dense, self._file, self.precision))

    @property
    def _file(self) -> Path:
        return onnx_path(self.run.root, FP32, "dense")


def rounding(judge: Judge, dense: TimmModel, file: Path, precision: str) -> RoundingFacts:
    """The facts of one precision of a dense model whose fp32 file is there."""
    if precision == FP32:
        return RoundingFacts(precision=precision, bytes=_size(file), damage=None if judge.source.synthetic else 0.0)
    with folder_beside(file.with_name(f"rounding.{precision}")) as folder:
        path = folder / f"dense.{precision}.onnx"
        try:
            made = run_stage(judge.convert(precision, path), OnnxFile(file))
        except (ParityError, ArtifactError) as error:
            return RoundingFacts(precision=precision, bytes=None, damage=None, refused=str(error))
        damage = None if judge.source.synthetic else _damage(judge, dense, path, made.facts.target)
        if damage is not None and not math.isfinite(damage):
            return RoundingFacts(precision=precision, bytes=None, damage=None, refused="its outputs are not finite")
        facts = made.facts
        return RoundingFacts(precision=precision, bytes=facts.graph.size_bytes, damage=damage, whole=facts.left)


def _damage(judge: Judge, dense: TimmModel, path: Path, target: str) -> float:
    images = judge.source.split("validation").spread(IMAGES)
    with opened(target, path, threads=torch.get_num_threads()) as run:
        outputs = outputs_of(tensor_call(run), images)
    expected = outputs_of(dense.module, images)
    return float(divergence_by_image(likelihood_for(dense, judge.source), outputs, expected).mean())


def _size(file: Path) -> int:
    return OnnxFile(file).size_bytes


def sized(job: Job, facts: Sequence[RoundingFacts]) -> list[FileCost]:
    """What files cost for any widths, from what was found of the dense model's.

    Raises:
        BudgetError: the budget names a precision whose file is not the model, or no file is the model that it could speak of.
    """
    shape, files = job.problem.shape, list[FileCost]()
    for each in facts:
        if each.bytes is not None:
            files.append(file_cost(each.precision).measured(shape, each.bytes, each.whole, each.damage))
        elif each.precision in job.recipe.budget.files:
            raise BudgetError(f"budget.size.{each.precision} cannot be met: {each.refused}")
    if facts and not files:
        raise BudgetError(f"budget.size.{next(iter(job.recipe.budget.files))} cannot be met: {facts[-1].refused}")
    return files


def rounded(job: Job, dense: TimmModel) -> list[FileCost]:
    """The same without a run's folder, as for `slimvit plan`: the dense file is written and forgotten."""
    judge = Judge(job.source, job.dense.output, job.dense.module, job.labelled)
    precisions = [file.precision for file in job.problem.costs.files]
    if not precisions:
        return []
    with TemporaryDirectory(prefix="slimvit-rounding-") as folder:
        path = Path(folder) / "dense.fp32.onnx"
        run_stage(Export(job.recipe.export, path, judge.images(), judge.names_classes, tool()), dense)
        return sized(job, [rounding(judge, dense, path, precision) for precision in precisions])
