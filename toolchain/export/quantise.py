"""An fp32 ONNX graph → int8 linears, by ONNX Runtime's own quantisers: with scales measured per call, or fixed before.

Only linears with constant weights are quantised, and not the last one, which gives the logits, nor one that loses much more than
the others. Weights are symmetric with
one scale per output channel; LayerNorm, softmax, the products of attention, residual additions and the patch embedding
stay in fp32.

Weights use the numbers from -64 to 64 alone. An x86 processor without VNNI multiplies unsigned activations by signed weights
and adds each two products in 16 bits, cut off at 32767: 255 · (64 + 64) fits, 255 · (127 + 127) does not. So a file gives the
same sums on every processor, and is not another model on an older one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toolchain.errors import ArtifactError
from toolchain.export.conversion import Conversion
from toolchain.export.large import is_large, stored_bytes
from toolchain.export.loss import least_lossy
from toolchain.export.observe import largest_channels, save, steps
from toolchain.export.onnx_graph import inner_linears, last_linears, linear_nodes
from toolchain.export.scratch import exchange
from toolchain.export.smooth import norms, smoothed, smoothing

Array = NDArray[Any]
LINEARS = ["MatMul", "Gemm"]


def int8_dynamic(model: onnx.ModelProto, images: Array) -> Conversion:
    """Activations are quantised in each call by their own range: unsigned, one scale per tensor.

    Args:
        model: fp32.
        images: calibration images [N, C, H, W], preprocessed; none are needed. Where they show that much is lost, normalizations are
            smoothed and linears stay in fp32: see `loss`.
    """

    def smooth(left: frozenset[str]) -> Conversion:
        even = smoothed(
            model, smoothing(model, largest_channels(model, [norm.output for norm in norms(model)], images))
        )
        return Conversion(dynamic(even, left), even, smoothed=True)

    return least_lossy(model, [lambda left: Conversion(dynamic(model, left), model), smooth], images)


def dynamic(model: onnx.ModelProto, left: Collection[str] = ()) -> onnx.ModelProto:
    """The graph with all linears in int8 but the last and some that are left as they are, named by their nodes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def work(source: Path, made: Path) -> None:
        quantize_dynamic(
            source,
            made,
            op_types_to_quantize=LINEARS,
            nodes_to_exclude=[
                each for name in {*last_linears(model), *left} for each in (name, f"{name}_MatMul")
            ],  # a Gemm's new name
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=is_large(stored_bytes(model)),
            extra_options={"MatMulConstBOnly": True},
        )

    return _through_files(model, work)


def int8_qdq(model: onnx.ModelProto, images: Array) -> Conversion:
    """Activations are quantised with scales from calibration images, after SmoothQuant; Q/DQ pairs before each linear.

    Activations are symmetric and signed, biases int32: with them ONNX Runtime multiplies and adds in one operator. Linears that lose
    much stay in fp32: see `loss`.

    Args:
        model: fp32.
        images: calibration images [N, C, H, W], preprocessed.
    """
    inner = inner_linears(model)
    read = {node.name: node.input[0] for node in linear_nodes(model) if node.name in inner}
    names = {*(norm.output for norm in norms(model)), *read.values()}
    largest = largest_channels(model, sorted(names), images)
    scales = smoothing(model, largest)
    even = smoothed(model, scales)
    found = {name: float(largest[name].max()) for name in read.values()}
    for norm in norms(model):
        for name in found.keys() & {name for name, _, _ in norm.readers}:
            found[name] = float((largest[norm.output] / scales[norm.output]).max())

    def make(left: frozenset[str]) -> Conversion:
        ranges = {value: found[value] for name, value in read.items() if name not in left}
        chosen = [name for name in inner if name not in left]
        return Conversion(_static(even, chosen, ranges, images[:1]), even, ranges, smoothed=True)

    return least_lossy(model, [make], images)


def _static(model: onnx.ModelProto, chosen: Sequence[str], ranges: Mapping[str, float], some: Array) -> onnx.ModelProto:
    """The graph with some linears in int8, whose activations have the scales of ranges: activation → max|x|.

    ONNX Runtime's quantiser observes images of its own, a few, and the ranges stand in place of what it finds.
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
            self._steps = steps(some)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._steps, None)

    def work(source: Path, made: Path) -> None:
        quantize_static(
            source,
            made,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=LINEARS,
            nodes_to_quantize=list(chosen),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=is_large(stored_bytes(model)),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                # What follows a linear wants floats: rounding its output costs accuracy, and time in ONNX Runtime.
                "OpTypesToExcludeOutputQuantization": LINEARS,
                "TensorQuantOverrides": {
                    name: [{"rmin": np.float32(-most), "rmax": np.float32(most)}] for name, most in ranges.items()
                },
            },
        )

    return _through_files(model, work)


def _through_files(model: onnx.ModelProto, work: Callable[[Path, Path], None]) -> onnx.ModelProto:
    """What `work` makes of a graph, file to file, as the quantisers want it."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    logger = logging.getLogger()
    before, level = logger.level, logging.ERROR  # the quantisers recommend steps on the root logger that harm a ViT
    with exchange() as folder:
        source, made = folder / "model.onnx", folder / "int8.onnx"
        save(model, source)
        try:
            logger.setLevel(level)
            work(source, made)
        except OSError:
            raise
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot quantise the graph: {type(error).__name__}: {error}") from error
        finally:
            logger.setLevel(before)
        return onnx.load(made)
