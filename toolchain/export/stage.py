"""Export: a model of stock modules → an ONNX file that was read back and compared with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from torch import nn

from toolchain.artifacts.inputs import FIXED_SIZE
from toolchain.artifacts.onnx_file import FORM, FP32, PREPROCESS, UINT8, OnnxFile
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export.calls import Array, feeds_of, opened, torch_call
from toolchain.export.onnx_graph import GraphFacts, export_onnx, replacing
from toolchain.export.pixels import representable, with_pixels
from toolchain.export.precision import PRECISIONS, expanded, runs_on
from toolchain.export.probabilities import probabilities_rung, require_probabilities, with_probabilities
from toolchain.model import DeployModel, Made, Preprocess, TimmModel
from toolchain.outputs import CLASS_NAMES, CLASSES, FEATURES
from toolchain.outputs import OUTPUT as OUTPUT_KIND
from toolchain.parity import BATCHES, TOLERANCES, Rung, compare, require
from toolchain.recipe import ExportSection


def onnx_metadata(model: TimmModel | DeployModel, tool: str) -> dict[str, str]:
    """What an ONNX file says about itself: the model, its preprocessing, the plan's digest."""
    found = {
        "slimvit.tool": tool,
        "slimvit.model": model.ref.name,
        "slimvit.stage": model.stage,
        PREPROCESS: json.dumps(model.preprocess.to_dict(), sort_keys=True),
    }
    if model.output != "logits":
        found[OUTPUT_KIND] = model.output
    if (names := model.provenance.get(CLASS_NAMES)) and model.output not in FEATURES:
        found[CLASSES] = json.dumps(names, ensure_ascii=False)
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

    def requires(self, given: TimmModel | DeployModel) -> None:
        """Raises RecipeError for what this version cannot export."""
        check_section(self.section)
        if self.section.softmax:
            require_probabilities(given.output)
        if self.images.shape[1:] != given.preprocess.input_size:
            raise RecipeError(
                f"parity images have shape {self.images.shape[1:]}, the model {given.preprocess.input_size}"
            )

    def __call__(self, given: TimmModel | DeployModel) -> Made[OnnxFile, GraphFacts]:
        """The exported file; raises ParityError if it is not the model."""
        how = given.preprocess
        with replacing(self.path) as partial:  # what is not the model replaces nothing
            graph = export_onnx(
                given.module,
                partial,
                input_size=how.input_size,
                opset=self.section.opset,
                metadata={**onnx_metadata(given, self.tool), **({FORM: UINT8} if self.section.preprocess else {})},
                simplify=self.section.simplify,
                finish=self._finish(given),
                outputs=given.output_names,
            )
            rungs = self._rungs(given, partial)
            require(rungs)
        files = tuple(self.path.with_name(file.name) for file in graph.files)
        graph = replace(graph, files=files, notes=(*graph.notes, *fixed_size_notes(given.module, how)))
        return Made(OnnxFile(self.path), graph, tuple(rungs))

    def _rungs(self, given: TimmModel | DeployModel, path: Path) -> list[Rung]:
        """The file that is now at a path against the model, and its probabilities against its logits."""
        pixels = self.section.preprocess
        with opened("ort-cpu", path) as logits:
            rung = compare(
                given.stage,
                path.name,
                torch_call(given.module),
                logits,
                representable(self.images, given.preprocess) if pixels else self.images,
                tolerance=TOLERANCES["fp32"],
                real_images=self.real_images,
            )
        if not self.section.softmax:
            return [rung]
        feeds = feeds_of(OnnxFile(path))(self.images[: max(BATCHES)])
        return [rung, probabilities_rung(path, "ort-cpu", feeds, given.output)]

    def _finish(self, given: TimmModel | DeployModel) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
        """The change of the graph that adds preprocessing and probabilities, as the section asks."""

        def finish(model: onnx.ModelProto) -> onnx.ModelProto:
            model = with_pixels(model, given.preprocess) if self.section.preprocess else model
            return with_probabilities(model, given.output) if self.section.softmax else model

        return finish

    def ensures(self, given: TimmModel | DeployModel, made: OnnxFile) -> None:  # noqa: ARG002
        """Raises ArtifactError if no file was written."""
        if not made.path.is_file():
            raise ArtifactError(f"no file was written to {self.path}")


def fixed_size_notes(module: nn.Module, preprocess: Preprocess) -> list[str]:
    """A sentence where a model takes images of other sizes, or pads them, and its ONNX file does not."""
    asked = [
        name
        for name in ("dynamic_img_size", "dynamic_img_pad")
        if any(getattr(part, name, False) is True for part in module.modules())
    ]
    if not asked:
        return []
    _, height, width = preprocess.input_size
    return [f"The model has {' and '.join(asked)}; {FIXED_SIZE}, here at {height}×{width}."]


def check_section(section: ExportSection) -> None:
    """Raises TargetUnavailable where nothing here runs a precision that is asked for."""
    for name in expanded(section.precisions):
        if name != FP32:
            runs_on(PRECISIONS[name])
