"""Export: a model of stock modules → an ONNX file that was read back and compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolchain.artifact import DeployModel, OnnxArtifact, Preprocess, TimmModel
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export.onnx_graph import GraphFacts, export_onnx, read_onnx
from toolchain.export.parity import TOLERANCES, Rung, compare, require
from toolchain.export.precision import FP32, PRECISIONS, expanded, runs_on
from toolchain.recipe import ExportSection
from toolchain.targets import get_target

Array = NDArray[Any]
PREPROCESS = "slimvit.preprocess"


@dataclass(frozen=True)
class Exported:
    """An ONNX file, what is in it, and how it compares with the model that it came from."""

    artifact: OnnxArtifact
    graph: GraphFacts
    rung: Rung


def torch_call(module: nn.Module) -> Callable[[Array], Array]:
    """A function from images [B, C, H, W] to logits [B, classes], through torch on the CPU."""

    def call(images: Array) -> Array:
        with torch.no_grad():
            logits: Array = module(torch.from_numpy(images)).numpy()
        return logits

    return call


def onnx_metadata(model: TimmModel | DeployModel, tool: str) -> dict[str, str]:
    """What an ONNX file says about itself: the model, its preprocessing, the plan's digest."""
    found = {
        "slimvit.tool": tool,
        "slimvit.model": model.ref.name,
        "slimvit.stage": model.stage,
        PREPROCESS: json.dumps(asdict(model.preprocess), sort_keys=True),
    }
    if isinstance(model, DeployModel):
        found["slimvit.plan_sha256"] = model.plan.digest
    return found


@dataclass(frozen=True)
class Export:
    """TimmModel | DeployModel → ONNX, read back from disk and compared at batch 1 and 3.

    Attributes:
        section: [export].
        path: the file to write.
        images: at least 3 preprocessed images [N, C, H, W], float32.
        real_images: whether they are real.
        tool: name and version, for the metadata.
    """

    section: ExportSection
    path: Path
    images: Array
    real_images: bool
    tool: str
    name: str = "export"

    def requires(self, given: TimmModel | DeployModel) -> None:
        """Raises RecipeError for what this version cannot export."""
        check_section(self.section)
        if self.images.shape[1:] != given.preprocess.input_size:
            raise RecipeError(
                f"parity images have shape {self.images.shape[1:]}, the model {given.preprocess.input_size}"
            )

    def __call__(self, given: TimmModel | DeployModel) -> Exported:
        """The exported file."""
        graph = export_onnx(
            given.module,
            self.path,
            input_size=given.preprocess.input_size,
            opset=self.section.opset,
            metadata=onnx_metadata(given, self.tool),
            simplify=self.section.simplify,
        )
        with get_target("ort-cpu").open(self.path, threads=1) as runner:
            rung = compare(
                given.stage,
                self.path.name,
                torch_call(given.module),
                lambda images: runner.infer({"image": images})["logits"],
                self.images,
                tolerance=TOLERANCES["fp32"],
                real_images=self.real_images,
            )
        return Exported(OnnxArtifact(self.path, "fp32", given.preprocess), graph, rung)

    def ensures(self, given: TimmModel | DeployModel, made: Exported) -> None:  # noqa: ARG002
        """Raises ParityError if the file is not the model."""
        require([made.rung])


def read_preprocess(path: Path) -> Preprocess:
    """What an ONNX file that `Export` wrote says about its input.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it is damaged, or was not written by slimvit.
    """
    for entry in read_onnx(path).metadata_props:
        if entry.key == PREPROCESS:
            try:
                return Preprocess.from_dict(json.loads(entry.value))
            except (json.JSONDecodeError, ArtifactError) as error:
                raise ArtifactError(f"{path} has damaged metadata: {PREPROCESS}: {error}") from None
    raise ArtifactError(f"{path} does not say how its input is preprocessed: slimvit did not write it")


def check_section(section: ExportSection) -> None:
    """Raises RecipeError for settings that this version does not have, TargetUnavailable where nothing runs a precision."""
    for name in expanded(section.precisions):
        if name != FP32:
            runs_on(PRECISIONS[name])
    if section.preprocess:
        raise RecipeError("export.preprocess = true is not in this version; preprocessing is in the file's metadata")


def stack_images(images: list[torch.Tensor]) -> Array:
    """float32 [N, C, H, W] of single images."""
    stacked: Array = np.ascontiguousarray(torch.stack(images).numpy(), dtype=np.float32)
    return stacked


def graph_dict(graph: GraphFacts) -> Mapping[str, Any]:
    """The facts of a graph as JSON values."""
    return {
        "size_bytes": graph.size_bytes,
        "opset": graph.opset,
        "nodes_before": dict(graph.nodes_before),
        "nodes_after": dict(graph.nodes_after),
        "simplified": graph.simplified,
        "notes": list(graph.notes),
    }
