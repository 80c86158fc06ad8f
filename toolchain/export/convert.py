"""The stage that makes a file of another precision, and the rungs that hold it against the fp32 file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from toolchain.artifacts.onnx_file import FP32, GRAPH_TYPE, PRECISION, OnnxFile
from toolchain.artifacts.onnx_types import graph_precision
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export.calls import Array, Call, feeds_of, in_parts, judged, no_preprocess, opened
from toolchain.export.conversion import Conversion
from toolchain.export.gptq import nearest, output_error
from toolchain.export.loss import layer_of
from toolchain.export.observe import session
from toolchain.export.onnx_graph import (
    GraphFacts,
    census,
    last_linears,
    replacing,
    strip,
    write_onnx,
)
from toolchain.export.pixels import representable, with_pixels, without_pixels
from toolchain.export.precision import PRECISIONS, Precision, for_output, runs_on
from toolchain.export.precisions import MADE_FOR_NOISE
from toolchain.export.probabilities import (
    gives_probabilities,
    probabilities_rung,
    with_probabilities,
    without_probabilities,
)
from toolchain.export.weights import activation_scales, each_linear, largest_difference, largest_error
from toolchain.model import BATCH, IMAGE, Made, Preprocess
from toolchain.parity import BATCHES, TOLERANCES, Rung, Tolerance, compare, require

INT8_MAX = 127
INTEGERS = frozenset({TensorProto.INT8, TensorProto.INT4})
SCALE_ERROR = 0.01
"""Relative difference allowed between a scale and that of its observed range: fp32 sums in another order."""


@dataclass(frozen=True)
class ConvertFacts:
    """Facts of a converted file.

    Attributes:
        graph: what it consists of.
        target: on which it was compared with the fp32 file.
        left: layers whose linears keep a finer type: fp32 in an int8 file, int8 in an int4 file.
    """

    graph: GraphFacts
    target: str
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Convert:
    """fp32 OnnxFile → OnnxFile of another precision, read back from disk, run and compared.

    Attributes:
        precision: a name of `PRECISIONS`.
        path: the file to write.
        calibration: preprocessed images [N, C, H, W] that activations are observed on.
        images: at least 3 preprocessed images, others than those, that the files are compared on.
        real_images: whether they are real.
        noise: whether those that it calibrates on are none, but seeded noise.
    """

    precision: str
    path: Path
    calibration: Array
    images: Array
    real_images: bool
    noise: bool = False

    def requires(self, given: OnnxFile) -> None:
        """Raises RecipeError for an unknown precision or a file that is not fp32, TargetUnavailable if none can run it."""
        PRECISIONS.require(self.precision)
        if given.precision.name != FP32:
            raise RecipeError(f"{given.path} is {given.precision}; precisions are made from the fp32 file")
        runs_on(PRECISIONS[self.precision])

    def __call__(self, given: OnnxFile) -> Made[OnnxFile, ConvertFacts]:
        """The converted file, put in place of what was there once it is known to be the model; raises ParityError if it is not."""
        with replacing(self.path) as partial:
            graph, rungs, found = self._written(given, partial)  # the graphs that it holds are gone when files are run
            rungs += self._run(given, partial, found.target)
            require(rungs, f"Choose another precision than {self.precision}")
        graph = replace(graph, files=tuple(self.path.with_name(file.name) for file in graph.files))
        return Made(OnnxFile(self.path), replace(found, graph=graph), tuple(rungs))

    def _written(self, given: OnnxFile, path: Path) -> tuple[GraphFacts, list[Rung], ConvertFacts]:
        """(what is now at a path, its weights and scales held against the fp32 file's, what can run it)."""
        wanted, shipped = PRECISIONS[self.precision], onnx.load(given.path)
        how = _pixels_of(given)
        dense = without_probabilities(shipped if how is None else without_pixels(shipped, how))
        made, smoothing = self._converted(given, dense)
        strip(made.model)
        whole = made.model if how is None else with_pixels(made.model, how)
        whole = with_probabilities(whole, given.output or "logits") if gives_probabilities(shipped) else whole
        metadata = {entry.key: entry.value for entry in shipped.metadata_props} | {PRECISION: self.precision}
        if (rounded_to := graph_precision(whole)[0]) != self.precision.partition("-")[0]:
            metadata[GRAPH_TYPE] = rounded_to
        for key, value in sorted(metadata.items()):
            whole.metadata_props.add(key=key, value=value)
        files = write_onnx(whole, path)
        model = onnx.load(path)
        require_precision(model, shipped, wanted, left=len(made.left))
        graph = GraphFacts(
            files=files,
            size_bytes=sum(file.stat().st_size for file in files),
            opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
            nodes_before=census(shipped),
            nodes_after=census(model),
            simplified=False,
            notes=(*([MADE_FOR_NOISE] if self.noise and wanted.calibrated else []), *made.notes),
        )
        rungs = smoothing
        if made.moments:
            rungs.append(rounding_rung(dense, made.reference, made.moments, wanted.tolerance))
        rungs.append(weights_rung(made.reference, model, f"{self.path.name}, weights", wanted.tolerance))
        if made.ranges:
            rungs.append(scales_rung(made.ranges, model, f"{self.path.name}, scales", wanted.tolerance))
        left = tuple(sorted(layer_of(dense, name) for name in made.left))
        return graph, rungs, ConvertFacts(graph, runs_on(wanted), left)

    def _converted(self, given: OnnxFile, dense: onnx.ModelProto) -> tuple[Conversion, list[Rung]]:
        """(what the precision makes of a graph, the rung of its smoothing): smoothing that was a choice and fails is left out."""
        made = PRECISIONS[self.precision].convert(dense, self.calibration)
        if not made.smoothed:
            return made, []
        rung = self._smoothed(given, made.reference)
        if made.plain is None or rung.verdict == "pass":
            return made, [rung]
        plain = made.plain()
        note = f"Normalizations are not smoothed: in fp32 that would be another model than {given.path.name} ({rung.reason})."
        return replace(plain, notes=(note, *plain.notes)), []

    def _run(self, given: OnnxFile, path: Path, target: str) -> list[Rung]:
        """What is now at a path, run beside the fp32 file."""
        file = OnnxFile(path)
        tolerance = for_output(PRECISIONS[self.precision].tolerance, file.output)
        how = _pixels_of(file)
        images = self.images if how is None else representable(self.images, how)
        with opened("ort-cpu", given.path) as expected, opened(target, path) as got:
            rungs = [self._rung(given.path.name, expected, self.path.name, got, tolerance, images)]
        if gives_probabilities(file.model):
            feeds = feeds_of(file)(images[: max(BATCHES)])
            rungs.append(probabilities_rung(path, target, feeds, file.output or "logits"))
        return rungs

    def _smoothed(self, given: OnnxFile, reference: onnx.ModelProto) -> Rung:
        """The rung of the fp32 graph that the weights were rounded from, against the fp32 file."""
        how = _pixels_of(given)
        images = self.images if how is None else representable(self.images, how)
        with opened("ort-cpu", given.path) as expected, session(reference) as run:
            names = [value.name for value in reference.graph.output]
            smooth = in_parts(lambda part: run(names, {IMAGE: part}))
            return self._rung(
                given.path.name,
                expected,
                "smoothed",
                lambda part: judged(smooth(part)),
                TOLERANCES["fp32"],
                images,
            )

    def _rung(self, from_: str, expected: Call, to: str, got: Call, tolerance: Tolerance, images: Array) -> Rung:
        return compare(
            from_,
            to,
            expected,
            got,
            images,
            tolerance=tolerance,
            real_images=self.real_images,
            batches=sorted({*BATCHES, len(images)}),
        )

    def ensures(self, given: OnnxFile, made: OnnxFile) -> None:  # noqa: ARG002
        """Raises ArtifactError if no file was written."""
        if not made.path.is_file():
            raise ArtifactError(f"no {self.precision} file was written to {self.path}")


def _pixels_of(file: OnnxFile) -> Preprocess | None:
    """How a file that takes pixels prepares them; None of one that takes images. Raises ArtifactError where it does not say."""
    if not file.image.takes_pixels:
        return None
    if file.preprocess is None:
        raise no_preprocess(file.path)
    return file.preprocess


def weights_rung(expected: onnx.ModelProto, got: onnx.ModelProto, name: str, tolerance: Tolerance) -> Rung:
    """Whether every weight is that of the fp32 graph, to the rounding of its type: those of linears with their scales."""
    error, where = largest_error(each_linear(expected), each_linear(got))
    other, what = largest_difference(expected, got)
    if not other <= error:
        error, where = other, what
    reason = "" if error <= 1 else f"a weight of {where} is {error:.3g} times as far off as its type rounds"
    return Rung("fp32 weights", name, None, None, None, tolerance, "fail" if reason else "pass", reason)


def rounding_rung(
    dense: onnx.ModelProto, rounded: onnx.ModelProto, moments: Mapping[str, Array], tolerance: Tolerance
) -> Rung:
    """Whether no linear's output is further off, on the calibration images, than if every weight were rounded to the nearest.

    Both graphs are fp32. How far it is off is E‖Δy‖² = tr(ΔᵀMΔ), with Δ the change of weight and bias [in + 1, out].
    """
    shares = dict.fromkeys(moments, float("inf"))
    for ours, theirs in zip(each_linear(dense), each_linear(rounded), strict=True):
        if (moment := moments.get(theirs.name)) is not None:
            plain = ours.weight.copy()
            plain[:-1] = nearest(ours.weight[:-1]).weight
            errors = [output_error(ours.weight - each, moment).sum() for each in (theirs.weight, plain)]
            shares[theirs.name] = float(errors[0] / (errors[1] * (1 + 1e-6) + 1e-12))
    bad = {name: share for name, share in shares.items() if not share <= 1}  # also what is not a number
    where = max(bad, key=lambda name: bad[name], default="")
    reason = f"the output of {where} is {bad[where]:.3g} times as far off as by rounding to the nearest" if bad else ""
    return Rung("fp32 linears", "rounded", None, None, None, tolerance, "fail" if reason else "pass", reason)


def scales_rung(ranges: Mapping[str, float], model: onnx.ModelProto, name: str, tolerance: Tolerance) -> Rung:
    """Whether every quantised activation has the scale that its observed range asks for."""
    scales = activation_scales(model)
    errors = {what: abs(scales.get(what, 0.0) * INT8_MAX / most - 1) for what, most in ranges.items() if most > 0}
    where = max(errors, key=lambda what: errors[what])
    reason = (
        "" if errors[where] <= SCALE_ERROR else f"the scale of {where} is {errors[where]:.3g} off what was observed"
    )
    return Rung("observed ranges", name, None, None, None, tolerance, "fail" if reason else "pass", reason)


def require_precision(model: onnx.ModelProto, dense: onnx.ModelProto, wanted: Precision, left: int = 0) -> None:
    """Requires that all linears but `left` have the wanted precision, and that the graph equals the fp32 one otherwise.

    Raises:
        ArtifactError: a linear kept another type, linears were lost, or inputs and outputs are others.
    """
    for side in ("input", "output"):
        now, before = ([_signature(v) for v in getattr(each.graph, side)] for each in (model, dense))
        if now != before:
            raise ArtifactError(f"the {wanted.name} graph has the {side}s {now}, the fp32 graph {before}")
    if BATCH not in _signature(model.graph.input[0])[1]:
        raise ArtifactError(f"the {wanted.name} graph has a fixed batch")
    after, earlier = (_operators(each, wanted) for each in (model, dense))
    if after != earlier:
        lost, gained = earlier - after, after - earlier
        raise ArtifactError(f"the {wanted.name} graph lost the operators {dict(lost)} and gained {dict(gained)}")
    kept = sum(1 for _ in each_linear(dense))
    found = Counter(each.kind for each in each_linear(model))
    if sum(found.values()) != kept:
        raise ArtifactError(f"the {wanted.name} graph has {sum(found.values())} linears, the fp32 graph {kept}")
    others = {TensorProto.DataType.Name(kind): n for kind, n in found.items() if kind not in wanted.weight_types}
    allowed = left + len(last_linears(dense)) if INTEGERS & wanted.weight_types else 0  # they stay in floating point
    if sum(others.values()) > allowed:
        raise ArtifactError(f"the {wanted.name} graph has linears of other types: {others}")


def _operators(model: onnx.ModelProto, wanted: Precision) -> Counter[str]:
    """Operator with its attributes → number of nodes, without linears and what a conversion puts around them."""
    return Counter(
        " ".join([node.op_type, *sorted(str(onnx.helper.printable_attribute(each)) for each in node.attribute)])
        for node in model.graph.node
        if node.op_type not in wanted.operators
    )


def _signature(value: onnx.ValueInfoProto) -> tuple[str, tuple[Any, ...], int]:
    kind = value.type.tensor_type
    return value.name, tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim), kind.elem_type
