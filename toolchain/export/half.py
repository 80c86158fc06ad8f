"""An fp32 ONNX graph → half the bits: fp16 or bf16, with LayerNorm and softmax kept in fp32.

Inputs and outputs stay fp32, so that a caller need not know. The places of the casts are those of ONNX Runtime's own
converter; bf16 takes the same graph, and its weights are rounded from fp32, not from fp16.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from toolchain.artifacts.onnx_plain import copied
from toolchain.errors import ArtifactError
from toolchain.export.conversion import Conversion
from toolchain.export.large import with_shapes
from toolchain.export.observe import largest_values

KEPT_FP32 = ["LayerNormalization", "RMSNormalization", "Softmax"]
FP16_MAX = float(np.finfo(np.float16).max)
MARGIN = 2.0
"""Safety factor on observed activations: other images may give larger values."""


def fp16(model: onnx.ModelProto, images: NDArray[Any]) -> Conversion:
    """The graph in fp16.

    Args:
        model: fp32.
        images: what activations are observed on [N, C, H, W]: a CPU computes fp16 files in fp32 and shows no overflow.

    Raises:
        ArtifactError: a weight or an activation is beyond what fp16 holds, and would be cut off or become infinite.
    """
    for tensor in model.graph.initializer:
        if (
            tensor.data_type == TensorProto.FLOAT
            and (largest := float(np.abs(numpy_helper.to_array(tensor)).max(initial=0))) > FP16_MAX
        ):
            raise ArtifactError(f"{tensor.name} holds {largest:.3g}, more than fp16 can: {FP16_MAX:.0f}; take bf16")
    values = largest_values(model, images)
    where = max(values, key=lambda name: values[name])
    if not values[where] * MARGIN <= FP16_MAX:
        raise ArtifactError(
            f"{where} comes to {values[where]:.3g}, and fp16 holds {FP16_MAX:.0f}: on a GPU the file could overflow; take bf16"
        )
    return Conversion(_converted(model), model)


def bf16(model: onnx.ModelProto, images: NDArray[Any]) -> Conversion:  # noqa: ARG001 - as above
    """The graph in bf16; operators that this opset does not define for bf16 stay in fp32."""
    version = next(entry.version for entry in model.opset_import if entry.domain == "")
    kinds = sorted({node.op_type for node in model.graph.node})
    result = _converted(model, [kind for kind in kinds if not _takes_bf16(kind, version)])
    exact = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in result.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(exact.get(tensor.name, tensor)).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in result.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            elif attribute.t.data_type == TensorProto.FLOAT16:
                values = numpy_helper.to_array(attribute.t).astype(np.float32).astype(ml_dtypes.bfloat16)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
    return Conversion(result, model)


def _takes_bf16(kind: str, version: int) -> bool:
    schema = onnx.defs.get_schema(kind, max_inclusive_version=version)
    floats = [each for each in schema.type_constraints if "tensor(float)" in each.allowed_type_strs]
    return all("tensor(bfloat16)" in each.allowed_type_strs for each in floats)


def _converted(model: onnx.ModelProto, kept: Sequence[str] = ()) -> onnx.ModelProto:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    converted = copied(model)
    del converted.graph.value_info[:]
    converted.graph.value_info.extend(with_shapes(model).graph.value_info)
    try:
        result: onnx.ModelProto = convert_float_to_float16(
            converted, keep_io_types=True, op_block_list=[*KEPT_FP32, *kept], disable_shape_infer=True
        )
        OnnxModel(result).topological_sort()  # it leaves its casts of the inputs at the end
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime cannot convert the graph to fp16: {type(error).__name__}: {error}"
        ) from error
    del result.graph.value_info[:]  # shapes and types of before
    return result
