"""Precisions of a file: each a converter of the fp32 graph, what its logits may differ by, and where it can run.

A new precision is one `Precision` and its registration in `PRECISIONS`. Precision is in the graph and never in a builder's flag: what runs the file
runs these types, or refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.errors import RecipeError, TargetUnavailable
from toolchain.export.calls import Call
from toolchain.export.conversion import Conversion
from toolchain.export.graph_types import graph_precision
from toolchain.export.half import bf16, fp16
from toolchain.export.inputs import PREPROCESS
from toolchain.export.quantise import STEP, int8_dynamic, int8_qdq
from toolchain.export.weights import LINEARS
from toolchain.parity import TOLERANCES, Tolerance
from toolchain.registry import Registry
from toolchain.targets import get_target

Array = NDArray[Any]
PRECISION = "slimvit.precision"
"""The key of a file's metadata that names its precision."""


AROUND_LINEARS = frozenset(
    {
        *LINEARS,
        *("Cast", "Mul", "Add", "Transpose", "Reshape"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    }
)
"""Linears, and the operators that a conversion may put around them."""


@dataclass(frozen=True)
class Precision:
    """How a file of one precision is made from the fp32 file.

    Attributes:
        name: in recipes and file names.
        convert: (fp32 model with its weights, calibration images [N, C, H, W]) → the model and what it was made from.
        tolerance: what the logits may differ by from those of the fp32 file.
        weight_types: the types that weights of linears may have in the file, but for the last linear.
        targets: what can run the file; the first that is there judges it, and all are timed if a recipe names them.
        calibrated: whether the images decide anything.
        product: the type that a runtime must see in its matrix products, as TensorRT names it; "INT8" in its int8 linears
            alone.
        operators: what a conversion may add to the graph or take from it.
    """

    name: str
    convert: Callable[[onnx.ModelProto, Array], Conversion]
    tolerance: Tolerance
    weight_types: frozenset[int]
    targets: tuple[str, ...] = ("ort-cpu", "openvino-cpu", "openvino-cpu-bf16", "ort-cuda", "trt", "trt-rtx")
    calibrated: bool = False
    product: str = "FLOAT"
    operators: frozenset[str] = AROUND_LINEARS


ENTRIES = (
    Precision("fp16", fp16, Tolerance(None, 0.9999, 0.98), frozenset({TensorProto.FLOAT16}), product="HALF"),
    Precision(
        "bf16",
        bf16,
        Tolerance(None, 0.999, 0.97),
        frozenset({TensorProto.BFLOAT16}),
        product="BF16",
        targets=("openvino-cpu", "openvino-cpu-bf16", "trt", "trt-rtx"),  # ONNX Runtime has no bf16 MatMul on a CPU
    ),
    Precision(
        "int8-dynamic",
        int8_dynamic,
        Tolerance(None, 0.95, 0.97),
        frozenset({TensorProto.INT8}),
        targets=("ort-cpu", "openvino-cpu"),
    ),
    Precision(
        "int8-qdq",
        int8_qdq,
        Tolerance(None, 0.95, 0.97),
        frozenset({TensorProto.INT8}),
        targets=("ort-cpu", "openvino-cpu", "trt", "trt-rtx"),
        calibrated=True,
        product="INT8",
    ),
)
PRECISIONS: Registry[Precision] = Registry("precision", "slimvit.precisions", {each.name: each for each in ENTRIES})


FP32 = "fp32"
COMPARED = 256
"""Real images that files of two precisions are compared on; of synthetic ones, those of the largest batch."""
EITHER = "int8"
"""In a recipe: both kinds of int8, of which one that is not the same model is left out."""
EITHER_OF = ("int8-dynamic", "int8-qdq")


def expanded(asked: Sequence[str]) -> dict[str, bool]:
    """Precision → whether a file of it that is not the same model is an error, for what a recipe asks; raises RecipeError."""
    found: dict[str, bool] = {}
    for name in asked:
        for each in EITHER_OF if name == EITHER else (name,):
            if each not in (FP32, *PRECISIONS):
                known = ", ".join((FP32, EITHER, *PRECISIONS))
                raise RecipeError(f"unknown precision {each!r} in export.precisions; known: {known}")
            found[each] = found.get(each, False) or name != EITHER
    return found


@dataclass(frozen=True)
class Reading:
    """The precision of an artifact, and where it is known from.

    Attributes:
        name: as in `PRECISIONS`, "fp32", or of others' files a type of `graph_types.COARSEST_FIRST`; "" where it is not known.
        reason: the words that say what it was read from; "" where the artifact says so itself and its graph agrees.
    """

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'of no known precision'} ({self.reason})" if self.reason else self.name


def precision_of(path: Path) -> Reading:
    """The precision of a model folder or an ONNX file; of a file, that of its graph, which its metadata only names closer.

    Raises:
        StorageError, ArtifactError: the file cannot be read.
    """
    return Reading(FP32) if path.is_dir() else precision_in(read_onnx(path))


def precision_in(model: onnx.ModelProto) -> Reading:
    """The same for a file that was read already."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    name, reason = graph_precision(model)
    declared = metadata.get(PRECISION, FP32 if PREPROCESS in metadata else "")
    if declared in (FP32, *PRECISIONS) and name in ("", declared.partition("-")[0]):
        return Reading(declared)
    if PRECISION in metadata:
        reason += f"; its metadata says {declared}"
    return Reading(name, reason)


def declared_precision(path: Path) -> str:
    """The precision that an ONNX file of slimvit's says it has, "fp32" if it says none; "" of anyone else's file.

    A file that others made of slimvit's, so that its graph has another precision, is theirs.

    Raises:
        StorageError, ArtifactError: the file cannot be read.
    """
    model = read_onnx(path)
    metadata, reading = {entry.key for entry in model.metadata_props}, precision_in(model)
    return reading.name if PREPROCESS in metadata and not reading.reason else ""


def tolerance_of(*readings: Reading) -> Tolerance | None:
    """What the logits of artifacts of these precisions may differ by: the loosest of all; None if one has no tolerance.

    That of int8 is for whatever rounds to 8 bits in integers, that of fp32 for fp64 too. None was measured for others.
    """
    known = {**TOLERANCES, **{name: each.tolerance for name, each in PRECISIONS.items()}}
    known |= {"fp64": known[FP32], EITHER: known[EITHER_OF[0]]}
    if any(reading.name not in known for reading in readings):
        return None
    return min((known[reading.name] for reading in readings), key=lambda tolerance: tolerance.cosine_min)


def reference_target(reading: Reading) -> str:
    """What runs a file of a precision here: ONNX Runtime on the CPU, or for slimvit's others the first that can.

    Raises:
        TargetUnavailable: nothing here does.
    """
    return runs_on(PRECISIONS[reading.name]) if reading.name in PRECISIONS else "ort-cpu"


def runs_on(precision: Precision) -> str:
    """The first target here that can run files of a precision; raises TargetUnavailable if there is none."""
    reasons = []
    for name in precision.targets:
        try:
            get_target(name).require_run()
        except TargetUnavailable as error:
            reasons.append(str(error))
        else:
            return name
    raise TargetUnavailable(precision.targets[0], f"nothing here runs {precision.name}: {'; '.join(reasons)}")


def in_steps(call: Call, step: int = STEP) -> Call:
    """The same function, many images a few at a time; up to `step` of them are one call."""

    def run(images: Array) -> Array:
        parts = [call(images[start : start + step]) for start in range(0, len(images), step)]
        joined: Array = np.concatenate(parts)
        return joined

    return run
