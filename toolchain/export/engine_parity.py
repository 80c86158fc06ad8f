"""An engine against the ONNX file that it was built from, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toolchain.export.calls import Array, opened
from toolchain.export.precision import (
    COMPARED,
    FP32,
    PRECISIONS,
    in_steps,
    precision_of,
    reference_target,
    tolerance_of,
)
from toolchain.model import EngineArtifact, Preprocess
from toolchain.parity import BATCHES, Rung, Tolerance, compare, not_run

# A GPU may multiply fp32 matrices in TF32, which keeps 10 bits of the mantissa: the logits keep their direction.
TF32 = Tolerance(max_abs=None, cosine_min=0.999, top1_min=None)


def engine_rung(
    onnx: Path,
    made: EngineArtifact,
    profile: tuple[int, int, int],
    images: Callable[[int], Array],
    available: int | None,
    preprocess: Preprocess | None = None,
) -> Rung:
    """The rung of an engine against the file that it was built from, run on the CPU.

    Args:
        onnx: the file.
        made: the engine; the rung is not run where it cannot be loaded, and gives the reason.
        profile: (min, opt, max) batch of the engine; batches outside it are not asked of it.
        images: the number of images that are wanted → that many, [N, C, H, W].
        available: how many images there are for which the largest output names a class; None where it does not, as for noise.
        preprocess: how they were prepared, for a file that takes pixels and does not say.
    """
    reading = precision_of(onnx)
    tolerance = TF32 if reading.name in (FP32, "fp64") else tolerance_of(reading)
    stored = made.facts.get("weights", {})
    if reading.name == FP32 and "f16" in stored:  # OpenVINO's format: fp16 stored, fp32 computed
        tolerance = PRECISIONS["fp16"].tolerance
    if tolerance is None:
        reason = f"{onnx.name} is {reading}, for which slimvit has no tolerance"
        return not_run(onnx.name, made.path.name, tolerance=TF32, reason=reason)
    if made.facts["loaded"] != "pass":
        return not_run(onnx.name, made.path.name, tolerance=tolerance, reason=made.facts["loaded_reason"])
    batches = [size for size in BATCHES if profile[0] <= size <= profile[2]] or [profile[0]]
    step = max(batches)
    if available is not None:  # three images say little of top-1
        batches.append(max(step, min(COMPARED, available) // step * step))
    given = images(max(batches))
    with (
        opened(reference_target(reading), onnx, preprocess=preprocess) as expected,
        opened(made.target, made.path, described_by=onnx, preprocess=preprocess) as got,
    ):
        return compare(
            onnx.name,
            made.path.name,
            expected,
            in_steps(got, step),
            given,
            tolerance=tolerance,
            real_images=available is not None,
            batches=batches,
        )
