"""Precisions of a file: each a converter of the fp32 graph, what its logits may differ by, and where it can run.

A new precision is one `Precision` and its registration in `PRECISIONS`. Precision is in the graph and never in a builder's flag: what runs the file
runs these types, or refuses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from toolchain.artifacts import Artifact, Reading
from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.cost import FileCost, Storage
from toolchain.errors import RecipeError, TargetUnavailable
from toolchain.export.calls import STEP, Outputs, opened_outputs
from toolchain.export.conversion import Conversion
from toolchain.export.half import bf16, fp16
from toolchain.export.int4 import int4
from toolchain.export.precisions import PRECISIONS as PRECISIONS  # noqa: PLC0414 - where it is looked for
from toolchain.export.quantise import int8_dynamic, int8_qdq
from toolchain.export.weights import LINEARS
from toolchain.model import Preprocess
from toolchain.outputs import FEATURES, Output
from toolchain.parity import TOLERANCES, Tolerance
from toolchain.targets import TARGETS, get_target

Array = NDArray[Any]
FLOAT = "FLOAT"

AROUND_LINEARS = frozenset(
    {
        *LINEARS,
        *("Cast", "Mul", "Add", "Transpose", "Reshape"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    }
)
"""Linears, and the operators that a conversion may put around them."""


FLOATS = Storage()


@dataclass(frozen=True)
class Precision:
    """How a file of one precision is made from the fp32 file.

    Attributes:
        name: in recipes and file names.
        convert: (fp32 model with its weights, calibration images [N, C, H, W]) → the model and what it was made from.
        tolerance: what the logits may differ by from those of the fp32 file.
        weight_types: the types that weights of linears may have in the file, but for the last linear and those that a conversion leaves.
        product: the type that a runtime must see in its matrix products, as TensorRT names it; "INT8" in its int8 linears
            alone, "INT8-DYNAMIC" where scales are those of each call, "INT4-DYNAMIC" where weights are besides stored in int4.
            Targets that load it run the file: the first that is there judges it, and all are timed if a recipe names them.
        calibrated: whether the images decide every file.
        adapts: whether they decide something where there are real ones, and none are needed.
        operators: what a conversion may add to the graph or take from it.
        needs: what has to be installed for it where no target loads it; "" where some always does.
        storage: the bytes of its weights; what no width changes is measured.
    """

    name: str
    convert: Callable[[onnx.ModelProto, Array], Conversion]
    tolerance: Tolerance
    weight_types: frozenset[int]
    product: str = FLOAT
    calibrated: bool = False
    adapts: bool = False
    operators: frozenset[str] = AROUND_LINEARS
    needs: str = ""
    storage: Storage = FLOATS


HALVES = Storage(weight=2, bias=2, other=2)
EIGHTS = Storage(weight=1, output=5, pair=900)
"""A scale of four bytes and a zero point of one for each output."""
FP16 = Precision(
    "fp16",
    fp16,
    Tolerance(None, 0.9999, 0.98, centred_min=0.9999),
    frozenset({TensorProto.FLOAT16}),
    product="HALF",
    storage=HALVES,
)
BF16 = Precision(
    "bf16",
    bf16,
    Tolerance(None, 0.999, 0.97, centred_min=0.999),
    frozenset({TensorProto.BFLOAT16}),
    product="BF16",
    storage=HALVES,
)
INT8_DYNAMIC = Precision(
    "int8-dynamic",
    int8_dynamic,
    Tolerance(None, 0.95, 0.97, centred_min=0.95),
    frozenset({TensorProto.INT8}),
    product="INT8-DYNAMIC",
    adapts=True,
    storage=EIGHTS,
)
INT8_QDQ = Precision(
    "int8-qdq",
    int8_qdq,
    Tolerance(None, 0.95, 0.97, centred_min=0.95),
    frozenset({TensorProto.INT8}),
    product="INT8",
    calibrated=True,
    storage=replace(EIGHTS, bias=12),  # with a scale and a zero point of four bytes each
)
INT4 = Precision(
    "int4",
    int4,
    Tolerance(None, 0.9, 0.95, centred_min=0.9),
    frozenset({TensorProto.INT4}),
    product="INT4-DYNAMIC",
    calibrated=True,
    needs="onnxruntime 1.23 or newer",
    storage=Storage(weight=0.5, output=5, bias=2, other=2, pair=1000, left=replace(EIGHTS, bias=2)),
)


SPREAD_MAX = 0.5
"""Largest `spread_error` of outputs that name no class, in a file of any precision; weights are checked separately."""


def for_output(tolerance: Tolerance, output: Output | None) -> Tolerance:
    """What outputs of a kind may differ by: of those that name no class, how they differ between images must be kept too.

    A tolerance that bounds every number says it already.
    """
    if output not in ("logits", None):
        tolerance = replace(tolerance, centred_min=None)
    if tolerance.max_abs is not None or output not in {"regression", *FEATURES}:
        return tolerance
    return replace(tolerance, spread_max=SPREAD_MAX)


COMPARED = 256
"""Real images that files of two precisions are compared on; of synthetic ones, those of the largest batch."""
EITHER = "int8"
"""In a recipe: every kind of int8, of which one that is not the same model is left out."""


def int8_kinds() -> tuple[str, ...]:
    """The precisions whose linears have int8 weights."""
    return tuple(name for name, each in PRECISIONS.items() if TensorProto.INT8 in each.weight_types)


def product_of(precision: str) -> str:
    """The type of the matrix products in files of a precision, as `Target.loads` and `Target.builds` name it."""
    return FLOAT if precision == FP32 else PRECISIONS.require(precision).product


def file_cost(precision: str) -> FileCost:
    """What files of a precision cost by their weights alone; raises RecipeError if it is unknown."""
    return FileCost(precision, FLOATS if precision == FP32 else PRECISIONS.require(precision).storage)


def expanded(asked: Sequence[str], key: str = "export.precisions") -> dict[str, bool]:
    """Precision → whether a file of it that is not the same model is an error, for what a recipe's key asks; raises RecipeError."""
    required: dict[str, bool] = {}
    for name in asked:
        for each in int8_kinds() if name == EITHER else (name,):
            if each not in (FP32, *PRECISIONS):
                known = ", ".join((FP32, EITHER, *PRECISIONS))
                raise RecipeError(f"unknown precision {each!r} in {key}; known: {known}")
            required[each] = required.get(each, False) or name != EITHER
    return required


def tolerance_of(*readings: Reading) -> Tolerance | None:
    """What the logits of artifacts of these precisions may differ by: the loosest of all; None if one has no tolerance.

    That of int8 is for whatever rounds to 8 bits in integers, that of fp32 for fp64 too. None was measured for others.
    """
    known = {**TOLERANCES, **{name: each.tolerance for name, each in PRECISIONS.items()}}
    known |= {"fp64": known[FP32], EITHER: known[int8_kinds()[0]]}
    if any(reading.name not in known for reading in readings):
        return None
    return min((known[reading.name] for reading in readings), key=lambda tolerance: tolerance.cosine_min)


def reference_target(artifact: Artifact) -> str:
    """The first target here that can run an artifact, an ONNX file in its precision; raises TargetUnavailable if there is none.

    Files of any other kind are their runtime's own, whatever they hold.
    """
    known = PRECISIONS.get(artifact.precision.name)
    if known is not None and artifact.name == OnnxFile.name:
        return runs_on(known)
    takers = [name for name, target in TARGETS.items() if artifact.name in target.takes]
    return _first_that_runs(takers, f"{artifact.word}s")


def runs_on(precision: Precision) -> str:
    """The first target here that can run ONNX files of a precision; raises TargetUnavailable if there is none."""
    loaders = [n for n, each in TARGETS.items() if OnnxFile.name in each.takes and precision.product in each.loads]
    return _first_that_runs(loaders, precision.name, f"; it needs {precision.needs}" if precision.needs else "")


def _first_that_runs(targets: Sequence[str], what: str, needs: str = "") -> str:
    reasons = []
    for name in targets:
        try:
            get_target(name).require_outputs()
        except TargetUnavailable as error:
            reasons.append(str(error))
        else:
            return name
    why = "; ".join(reasons) or f"no target takes them{needs}"
    raise TargetUnavailable(next(iter(targets), what), f"nothing here runs {what}: {why}")


@contextlib.contextmanager
def opened_artifact(artifact: Artifact, preprocess: Preprocess | None = None, step: int = STEP) -> Iterator[Outputs]:
    """Images [B, C, H, W] → name → output of an artifact, in a block, by the first target here that can run it.

    Args:
        artifact: one that takes images.
        preprocess: how the images were prepared, for a file that takes pixels and does not say.
        step: the most images of one call.

    Raises:
        TargetUnavailable: nothing here runs it.
        StorageError, ArtifactError: it cannot be read.
    """
    import torch

    target, threads = reference_target(artifact), torch.get_num_threads()
    with opened_outputs(target, artifact.path, threads, artifact, preprocess=preprocess, step=step) as run:
        yield run
