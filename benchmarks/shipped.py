"""A backbone as the ONNX file of a precision that ships, made as a run makes it, and its tokens as the file gives them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.data import Images
from toolchain.export.calls import opened, tensor_call
from toolchain.export.precision import PRECISIONS, runs_on
from toolchain.export.stage import Export
from toolchain.likelihood import in_batches
from toolchain.model import DeployModel, TimmModel, run_stage
from toolchain.pipeline.job import Job
from toolchain.pipeline.judge import Judge
from toolchain.version import tool


@dataclass(frozen=True)
class File:
    """A file, and what its making told.

    Attributes:
        path: where it lies.
        target: what runs it here.
        facts: {"bytes", "left", "notes"}: layers that kept a finer type than the rest, and sentences about what was decided.
    """

    path: Path
    target: str
    facts: dict[str, Any]

    def tokens(self, images: Images) -> Tensor:
        """Its output [N, 1 + P, D], image by image, as an app with batch 1 calls it."""
        with opened(self.target, self.path, torch.get_num_threads(), step=1) as run:
            return torch.cat([*in_batches(tensor_call(run), images)])


def written(model: TimmModel | DeployModel, job: Job, precision: str, folder: Path) -> File:
    """The file of a model whose output is all tokens, in a folder; raises ParityError if it is another model."""
    judge = Judge(job.source, job.dense.output, job.dense.module)
    whole = folder / f"{FP32}.onnx"
    plain = run_stage(Export(job.recipe.export, whole, judge.images(), judge.names_classes, tool()), model)
    if precision == FP32:
        return File(whole, "ort-cpu", _facts(plain.artifact, (), plain.facts.notes))
    made = run_stage(judge.convert(precision, folder / f"{precision}.onnx"), plain.artifact)
    facts = _facts(made.artifact, made.facts.left, made.facts.graph.notes)
    return File(made.artifact.path, runs_on(PRECISIONS[precision]), facts)


def _facts(file: OnnxFile, left: tuple[str, ...], notes: tuple[str, ...]) -> dict[str, Any]:
    return {"bytes": file.size_bytes, "left": list(left), "notes": list(notes)}


def file_versions() -> dict[str, str]:
    """What makes and runs a file."""
    return {name: version(name) for name in ("onnx", "onnxruntime")}
