"""An fp32 ONNX graph → int8 linears, by ONNX Runtime's own quantisers: with scales measured per call, or fixed before.

Only linears with constant weights are quantised, and not the last one, which gives the logits. Weights are symmetric with
one scale per output channel; LayerNorm, softmax, the products of attention, residual additions and the patch embedding
stay in fp32.

Weights use the numbers from -64 to 64 alone. An x86 processor without VNNI multiplies unsigned activations by signed weights
and adds each two products in 16 bits, cut off at 32767: 255 · (64 + 64) fits, 255 · (127 + 127) does not. So a file gives the
same sums on every processor, and is not another model on an older one.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.artifacts.onnx_walk import linked
from toolchain.errors import ArtifactError
from toolchain.export.conversion import Conversion
from toolchain.export.large import detached, is_large, stored_bytes, with_shapes
from toolchain.export.onnx_graph import linear_nodes
from toolchain.export.smooth import norms, smoothed, smoothing
from toolchain.model import IMAGE
from toolchain.outputs import LOGITS

Array = NDArray[Any]
LINEARS = ["MatMul", "Gemm"]
AXIS = "slimvit.observed"
STEP = 32
"""Images of one call while activations are observed."""


def int8_dynamic(model: onnx.ModelProto, images: Array) -> Conversion:  # noqa: ARG001 - all converters take images
    """Activations are quantised in each call by their own range: unsigned, one scale per tensor."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def work(source: Path, made: Path) -> None:
        quantize_dynamic(
            source,
            made,
            op_types_to_quantize=LINEARS,
            nodes_to_exclude=[
                each for name in last_linears(model) for each in (name, f"{name}_MatMul")
            ],  # a Gemm's new name
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large(stored_bytes(model)),
            extra_options={"MatMulConstBOnly": True},
        )

    return Conversion(_through_files(model, work), model)


def int8_qdq(model: onnx.ModelProto, images: Array) -> Conversion:
    """Activations are quantised with scales from calibration images, after SmoothQuant; Q/DQ pairs before each linear.

    Activations are symmetric and signed, biases int32: with them ONNX Runtime multiplies and adds in one operator.

    Args:
        model: fp32.
        images: calibration images [N, C, H, W], preprocessed.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._steps = steps(images)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._steps, None)

    last = last_linears(model)
    inner = [node for node in linear_nodes(model) if node.name not in last]
    names = {*(norm.output for norm in norms(model)), *(node.input[0] for node in inner)}
    largest = largest_channels(model, sorted(names), images)
    scales = smoothing(model, largest)
    even = smoothed(model, scales)
    ranges = {node.input[0]: float(largest[node.input[0]].max()) for node in inner}
    for norm in norms(model):
        for name in ranges.keys() & {name for name, _, _ in norm.readers}:
            ranges[name] = float((largest[norm.output] / scales[norm.output]).max())

    def work(source: Path, made: Path) -> None:
        quantize_static(
            source,
            made,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=LINEARS,
            nodes_to_quantize=[node.name for node in inner],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=is_large(stored_bytes(even)),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                # What follows a linear wants floats: rounding its output costs accuracy, and time in ONNX Runtime.
                "OpTypesToExcludeOutputQuantization": LINEARS,
            },
        )

    return Conversion(_through_files(even, work), even, ranges, smoothed=True)


def steps(images: Array) -> Iterator[dict[str, Array]]:
    """The images as inputs of a few at a time."""
    for start in range(0, len(images), STEP):
        yield {IMAGE: images[start : start + STEP]}


def largest_channels(model: onnx.ModelProto, names: Sequence[str], images: Array) -> dict[str, Array]:
    """Value → max|x| of each of its channels (its last axis) over images.

    Raises:
        ArtifactError: ONNX Runtime cannot run the graph.
    """
    return _largest(model, names, images, by_channel=True)


def largest_values(model: onnx.ModelProto, images: Array) -> dict[str, float]:
    """Every value that a graph computes in fp32 → its max|x| over images; raises as `largest_channels`."""
    computed = (value for node in linked(with_shapes(model)).graph for value in node.outputs)
    names = [str(value.name) for value in computed if value.dtype == ir.DataType.FLOAT]
    return {name: float(most) for name, most in _largest(model, names, images, by_channel=False).items()}


def _largest(model: onnx.ModelProto, names: Sequence[str], images: Array, *, by_channel: bool) -> dict[str, Array]:
    """Taken inside the graph, so that no activation leaves it."""

    def watch(model: onnx.ModelProto) -> None:
        del model.graph.output[:]
        for name in names:
            flat, largest = f"{name}.flat", f"{name}.largest"
            model.graph.node.extend(
                [
                    onnx.helper.make_node("Abs", [name], [f"{name}.abs"]),
                    onnx.helper.make_node("Flatten", [f"{name}.abs"], [flat], axis=-1 if by_channel else 0),
                    onnx.helper.make_node("ReduceMax", [flat, f"{AXIS}.axes"], [largest], keepdims=0),
                ]
            )
            model.graph.output.append(onnx.ValueInfoProto(name=largest))
        axis = 0 if by_channel else 1  # flattened from the front, a value is one row
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis], np.int64), f"{AXIS}.axes"))

    found: dict[str, Array] = {}
    if not names:
        return found
    with session(model, watch) as run:
        for feeds in steps(images):
            for key, values in run([f"{name}.largest" for name in names], feeds).items():
                name = key.removesuffix(".largest")
                most = values if by_channel else values.max()
                found[name] = np.maximum(found[name], most) if name in found else most
    return found


@contextmanager
def session(
    model: onnx.ModelProto, change: Callable[[onnx.ModelProto], None] = lambda _: None
) -> Iterator[Callable[[Sequence[str], Mapping[str, Array]], dict[str, Array]]]:
    """(names of outputs, inputs) → outputs of a graph on the CPU, in a block; a copy of it is changed before."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="slimvit-quantise-") as folder:
        path = Path(folder, "model.onnx")
        _save(model, path, change)
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot load the graph to be quantised: {error}") from error
        yield lambda names, feeds: dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


def last_linears(model: onnx.ModelProto) -> set[str]:
    """Names of the linears that the logits come from: one, or several whose outputs are averaged; none of features."""
    linears, found = {node.name for node in linear_nodes(model)}, set()
    waiting = [value for value in linked(model).graph.outputs if value.name == LOGITS]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node.name in linears:
            found.add(node.name)
        elif node is not None:
            waiting += filter(None, node.inputs)
    return found


def _through_files(model: onnx.ModelProto, work: Callable[[Path, Path], None]) -> onnx.ModelProto:
    """What `work` makes of a graph, file to file, as the quantisers want it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    logger = logging.getLogger()
    before, level = logger.level, logging.ERROR  # the quantisers recommend steps on the root logger that harm a ViT
    with tempfile.TemporaryDirectory(prefix="slimvit-quantise-") as folder:
        source, made = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        _save(model, source)
        try:
            logger.setLevel(level)
            work(source, made)
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot quantise the graph: {type(error).__name__}: {error}") from error
        finally:
            logger.setLevel(before)
        return onnx.load(made)


def _save(model: onnx.ModelProto, path: Path, change: Callable[[onnx.ModelProto], None] = lambda _: None) -> None:
    """Writes a changed copy of a graph; of large weights there is no copy in memory."""
    if is_large(stored_bytes(model)):
        copied = detached(model, path.with_name(f"{path.name}.data"))
    else:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
    change(copied)
    onnx.save_model(copied, path)
