"""Judges each form of a model: figures, accuracy on the test split, and parity with the form before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.artifacts import Artifact, open_artifact
from toolchain.cost import ModelShape, trace
from toolchain.data import DataSource
from toolchain.errors import ArtifactError, ModelError
from toolchain.export.calls import Call, opened, stack_images, step_of, tensor_call, torch_call
from toolchain.export.convert import Convert
from toolchain.export.engine_parity import engine_rung
from toolchain.export.precision import COMPARED, PRECISIONS
from toolchain.likelihood import outputs_of
from toolchain.model import AnyModel, DeployModel
from toolchain.outputs import FEATURES, Output
from toolchain.parity import BATCHES, TOLERANCES, Array, Rung, Tolerance, compare
from toolchain.report.record import Counts, Figures
from toolchain.targets import EngineBuild
from toolchain.training.evaluate import accuracy
from toolchain.training.features import FeatureJudge, relative_error


@dataclass(frozen=True)
class Judge:
    """Every form of a run's model, judged on the images of one source.

    Attributes:
        source: the images.
        output: what the model's outputs are.
        dense: the model before compression, whose outputs are the reference where labels cannot judge; None for no such figure.
        labelled: the source with the labels by which features are judged through their neighbours; None where there are none.
    """

    source: DataSource
    output: Output = "logits"
    dense: nn.Module | None = None
    labelled: DataSource | None = None

    @property
    def names_classes(self) -> bool:
        """Whether the largest output names the class of a real image, so that agreement on it means something."""
        return self.output == "logits" and not self.source.synthetic

    def figures(self, model: AnyModel, folder: Path | None = None) -> Figures:
        """Parameters, MACs, bytes (on disk, if the model lies in a folder) and accuracy on the test split."""
        shape = _shape(model)
        size = shape.size_bytes if folder is None else (folder / "model.safetensors").stat().st_size
        counts = self._accuracy(model.module).model_dump()
        return Figures(params=shape.params, macs=shape.macs, bytes=size, **counts)

    def graph(self, path: Path, target: str = "ort-cpu") -> Counts:
        """Accuracy of an ONNX file on the test split, run by a target on this machine."""
        step = step_of(open_artifact(path))  # which lets go of a graph that may be large
        with opened(target, path, torch.get_num_threads(), step=step) as run:
            return self._accuracy(tensor_call(run))

    def built(self, source: Artifact, engine: EngineBuild, profile: tuple[int, int, int]) -> Counts:
        """Accuracy of an engine on the test split; arguments as of `engine`."""
        target, path, threads = engine.record.target, engine.path, torch.get_num_threads()
        step = max(engine.record.batches, default=profile[-1])
        with opened(target, path, threads, described_by=source, step=step, fill=True) as run:
            return self._accuracy(tensor_call(run))

    def _accuracy(self, model: Callable[[Tensor], Any]) -> Counts:
        """Accuracy with counts where labels judge the outputs; of other outputs their error against the dense model's."""
        if self.output in FEATURES:
            return Counts() if self._features is None else Counts(features=self._features(model))
        test = self.source.split("test")
        if self.source.labelled:
            judged = accuracy(model, test)
            return Counts(accuracy=judged.accuracy, wrong=judged.wrong, total=judged.total)
        if self._dense_outputs is None:
            return Counts()
        return Counts(error=relative_error(outputs_of(model, test), self._dense_outputs))

    @cached_property
    def _dense_outputs(self) -> Tensor | None:
        """The dense outputs [N, K] on the test split, where they are what other forms are judged by."""
        if self.dense is None or self.output == "logits" or self.source.synthetic:
            return None
        outputs: Tensor = outputs_of(self.dense, self.source.split("test"))
        return outputs

    @cached_property
    def _features(self) -> FeatureJudge | None:
        if self.dense is None or self.source.synthetic:
            return None
        judging = self.labelled or self.source
        bank = judging.split("train") if self.labelled else None
        return FeatureJudge(self.dense, judging.split("test"), bank)

    def require_finite(self, model: AnyModel) -> None:
        """Raises ModelError if a model overflows on the images: no other form could be held against it."""
        outputs = torch_call(model.module)(self.images())
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        bad = int((~np.stack([np.isfinite(part).reshape(len(part), -1).all(1) for part in parts]).all(0)).sum())
        if bad:
            raise ModelError(
                f"the {model.stage} model gives NaN or infinity for {bad} of {len(parts[0])} images: check that its weights are those of "
                "a finished training, and that images are normalised as in it (data.mean, data.std)"
            )

    def images(self, count: int = max(BATCHES)) -> Array:
        """As many images to compare on; validation first, and repeated where the whole source has fewer."""
        images = self.source.to_compare(count)
        return stack_images([images[index % len(images)] for index in range(count)])

    def calibration(self) -> Array:
        """All calibration images."""
        images = self.source.split("calibration")
        return stack_images([images[index][0] for index in range(len(images))])

    def convert(self, precision: str, path: Path) -> Convert:
        """The stage that makes a file of another precision, with the images that it calibrates and compares on."""
        how = PRECISIONS.get(precision)
        images = stack_images(self.source.to_compare(max(BATCHES) if self.source.synthetic else COMPARED))
        observed = images
        if how is not None and (how.calibrated or how.adapts):
            observed = images[:0] if how.adapts and self.source.synthetic else self.calibration()
        return Convert(precision, path, observed, images, real_images=self.names_classes, noise=self.source.synthetic)

    def modules(self, from_: str, expected: nn.Module, to: str, got: nn.Module) -> Rung:
        """The rung of two forms that are both PyTorch modules."""
        return self._rung(from_, torch_call(expected), to, torch_call(got), TOLERANCES["fp32"], BATCHES)

    def engine(self, source: Artifact, engine: EngineBuild, profile: tuple[int, int, int]) -> Rung:
        """The rung of an engine against the file that it was built from, run on the CPU.

        Args:
            source: the file.
            engine: the rung is not run where it cannot be loaded, and gives the reason.
            profile: (min, opt, max) batch of the engine; batches outside it are not tried.
        """
        available = len(self.source.split("validation")) if self.names_classes else None
        return engine_rung(source, engine, profile, self.images, available)

    def _rung(
        self,
        from_: str,
        expected: Call,
        to: str,
        got: Call,
        tolerance: Tolerance,
        batches: Sequence[int],
    ) -> Rung:
        images, top1 = self.images(max(batches)), self.names_classes
        return compare(from_, to, expected, got, images, tolerance=tolerance, real_images=top1, batches=batches)


def require_cost(model: DeployModel, predicted: ModelShape) -> None:
    """Nothing, if a model has exactly the parameters and MACs that its plan's widths predict; else ArtifactError."""
    shape = _shape(model)
    if (shape.params, shape.macs) != (predicted.params, predicted.macs):
        raise ArtifactError(
            f"the deploy model has {shape.params:,} parameters and {shape.macs:,} MACs, but its plan's widths give "
            f"{predicted.params:,} and {predicted.macs:,}"
        )


def _shape(model: AnyModel) -> ModelShape:
    return trace(model.module, model.family, model.preprocess.input_size)
