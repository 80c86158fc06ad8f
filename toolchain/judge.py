"""What is known of the forms of a model: figures, accuracy on the test split, and parity with the form before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolchain.artifact import AnyModel, DeployModel, EngineArtifact
from toolchain.cost import ModelShape, trace
from toolchain.data import DataSource
from toolchain.errors import ArtifactError
from toolchain.export.calls import opened
from toolchain.export.convert import Convert
from toolchain.export.parity import BATCHES, TOLERANCES, Array, Rung, Tolerance, compare, not_run
from toolchain.export.precision import COMPARED, FP32, PRECISIONS, in_steps, precision_of, runs_on
from toolchain.export.stage import stack_images, torch_call
from toolchain.training.evaluate import accuracy

# A GPU may multiply fp32 matrices in TF32, which keeps 10 bits of the mantissa: the logits keep their direction.
TF32 = Tolerance(max_abs=None, cosine_min=0.999, top1_min=None)


@dataclass(frozen=True)
class Judge:
    """Every form of a run's model, judged on the images of one source."""

    source: DataSource

    def figures(self, model: AnyModel, folder: Path | None = None) -> dict[str, Any]:
        """Parameters, MACs, bytes (on disk, if the model lies in a folder) and accuracy on the test split."""
        shape = _shape(model)
        size = shape.size_bytes if folder is None else (folder / "model.safetensors").stat().st_size
        return {"params": shape.params, "macs": shape.macs, "bytes": size, **self._accuracy(model.module)}

    def graph(self, path: Path, target: str = "ort-cpu") -> dict[str, Any]:
        """Accuracy of an ONNX file on the test split, run by a target on this machine."""
        with opened(target, path, threads=torch.get_num_threads()) as logits:
            return self._accuracy(lambda images: torch.from_numpy(logits(images.numpy())))

    def _accuracy(self, model: nn.Module | Callable[[Tensor], Tensor]) -> dict[str, Any]:
        if not self.source.labelled:
            return {"accuracy": None, "wrong": None, "total": None}
        found = accuracy(model, self.source.split("test"))
        return {"accuracy": found.accuracy, "wrong": found.wrong, "total": found.total}

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
        calibrated = precision in PRECISIONS and PRECISIONS[precision].calibrated
        images = stack_images(self.source.to_compare(max(BATCHES) if self.source.synthetic else COMPARED))
        observed = self.calibration() if calibrated else images
        return Convert(precision, path, observed, images, real_images=not self.source.synthetic)

    def modules(self, from_: str, expected: nn.Module, to: str, got: nn.Module) -> Rung:
        """The rung of two forms that are both PyTorch modules."""
        return self._rung(from_, torch_call(expected), to, torch_call(got), TOLERANCES["fp32"], BATCHES)

    def engine(self, onnx: Path, made: EngineArtifact, profile: tuple[int, int, int]) -> Rung:
        """The rung of an engine against the file that it was built from, run on the CPU.

        Args:
            onnx: the file.
            made: the engine; the rung is not run where it cannot be loaded, and gives the reason.
            profile: (min, opt, max) batch of the engine; batches outside it are not asked of it.
        """
        precision = precision_of(onnx)
        tolerance = TF32 if precision == FP32 else PRECISIONS[precision].tolerance
        if precision == FP32 and "f16" in made.facts.get(
            "weights", {}
        ):  # OpenVINO's format: fp16 stored, fp32 computed
            tolerance = PRECISIONS["fp16"].tolerance
        if made.facts["loaded"] != "pass":
            return not_run(onnx.name, made.path.name, tolerance=tolerance, reason=made.facts["loaded_reason"])
        reference = "ort-cpu" if precision == FP32 else runs_on(PRECISIONS[precision])
        batches = [size for size in BATCHES if profile[0] <= size <= profile[2]] or [profile[0]]
        step = max(batches)
        if not self.source.synthetic:  # three images say little of top-1
            batches.append(max(step, min(COMPARED, len(self.source.split("validation"))) // step * step))
        with opened(reference, onnx) as expected, opened(made.target, made.path, described_by=onnx) as got:
            steps = in_steps(expected), in_steps(got, step)
            return self._rung(onnx.name, steps[0], made.path.name, steps[1], tolerance, batches)

    def _rung(
        self,
        from_: str,
        expected: Callable[[Array], Array],
        to: str,
        got: Callable[[Array], Array],
        tolerance: Tolerance,
        batches: Sequence[int],
    ) -> Rung:
        images, real = self.images(max(batches)), not self.source.synthetic
        return compare(from_, to, expected, got, images, tolerance=tolerance, real_images=real, batches=batches)


def require_cost(made: DeployModel, predicted: ModelShape) -> None:
    """Nothing, if a model has exactly the parameters and MACs that its plan's widths predict; else ArtifactError."""
    shape = _shape(made)
    if (shape.params, shape.macs) != (predicted.params, predicted.macs):
        raise ArtifactError(
            f"the deploy model has {shape.params:,} parameters and {shape.macs:,} MACs, but its plan's widths give "
            f"{predicted.params:,} and {predicted.macs:,}"
        )


def _shape(model: AnyModel) -> ModelShape:
    return trace(model.module, model.family, model.preprocess.input_size)
