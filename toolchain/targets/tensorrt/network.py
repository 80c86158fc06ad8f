"""Reads what TensorRT makes of an ONNX file: the parsed network and its types, and the inspector's report on an engine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx as onnxlib
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from toolchain.errors import ArtifactError, StorageError, fault_words

MOVES = ("SHUFFLE", "CAST")
"""Layers through which the origin of a matrix product's operand is looked for."""
TYPES = {"FLOAT": r"fp32|float(?!8|16)", "HALF": r"fp16|half", "BF16": r"bf16|bfloat16", "INT8": r"int8"}
FORMATS = ("Format/Datatype", "Format", "DataType")
"""Where the inspector has a tensor's type: the first in TensorRT 10, the others in 11."""
PRODUCT = re.compile(r"gemm|matmul|matrix_?multiply|mha", re.IGNORECASE)
FUSED_ATTENTION = re.compile(r"mha|fused_attention", re.IGNORECASE)


def parse(trt: ModuleType, builder: Any, logger: Any, onnx: Path) -> tuple[Any, Any]:
    """(the strongly typed network of an ONNX file, the parser, which holds its weights until the engine is built).

    Args:
        trt: the module.
        builder: its builder.
        logger: its logger.
        onnx: the file. int32 biases of int8 linears, which TensorRT does not take, are given to it in fp32; their values
            are the same.

    Raises:
        ArtifactError: TensorRT refuses the file.
        StorageError: it cannot be read.
    """
    flag = typed_flag(trt)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    changed = with_float_biases(onnx)
    if not (parser.parse_from_file(str(onnx)) if changed is None else parser.parse(bytes_of(changed, onnx))):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = "; ".join(" ".join(filter(None, (e.node_operator(), e.node_name(), e.desc()))) for e in errors[:3])
        raise ArtifactError(f"{trt.__name__} {trt.__version__} cannot parse {onnx}: {said or 'no message'}")
    return network, parser


def with_float_biases(onnx: Path) -> onnxlib.ModelProto | None:
    """The model of a file with its int32 constants in fp32, as their scales say; None if it has none."""
    try:
        model = onnxlib.load(onnx, load_external_data=False)
    except OSError as error:
        raise StorageError(f"cannot read {onnx}: {fault_words(error)}") from error
    except DecodeError:
        return None  # the parser has the better words
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and set(node.input) <= set(stored)
        and stored[node.input[0]].data_type == TensorProto.INT32
    ]
    if not nodes:
        return None
    onnxlib.load_external_data_for_model(model, str(onnx.parent))
    for node in nodes:
        steps, scale = (numpy_helper.to_array(stored[name]) for name in node.input[:2])
        bias = np.asarray(steps * scale.astype(np.float32), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(bias, node.output[0]))
        model.graph.node.remove(node)
    used = {name for node in model.graph.node for name in node.input}
    for name in {name for node in nodes for name in node.input} - used:
        model.graph.initializer.remove(stored[name])
    return model


def bytes_of(model: onnxlib.ModelProto, onnx: Path) -> bytes:
    """The bytes of a model that was read from a file; raises ArtifactError if they are more than protobuf can write."""
    try:
        return bytes(model.SerializeToString())
    except EncodeError as error:
        raise ArtifactError(
            f"{onnx} has int32 biases and more than 2 GB of weights; TensorRT takes no such biases, and they cannot be "
            "given to it in fp32. Build the engine from an fp16 file."
        ) from error


def typed_flag(trt: ModuleType) -> Any:
    """The network flag for strong typing; None in versions that know no other mode."""
    return getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)


def is_strongly_typed(trt: ModuleType, network: Any) -> bool:
    """Whether a network keeps the types of its file."""
    flag = typed_flag(trt)
    return flag is None or bool(network.get_flag(flag))


@dataclass(frozen=True)
class Census:
    """What a network consists of: layers by type, their output tensors and matrix products by dtype, attentions."""

    layers: dict[str, int]
    tensor_dtypes: dict[str, int]
    matmul_dtypes: dict[str, int]
    matmul_layers: int
    attention_layers: int


def census(trt: ModuleType, network: Any) -> Census:
    """What a network consists of; a product with a softmax is one for each attention.

    A product of two operands that were dequantised counts as INT8: that is how TensorRT is told of one. What the optimizer
    makes of it is in the inspector's output; this is what it must keep, because it is typed.
    """
    layers: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    products: Counter[str] = Counter()
    attention = 0
    all_layers = [network.get_layer(index) for index in range(network.num_layers)]
    made_by = {layer.get_output(index).name: layer for layer in all_layers for index in range(layer.num_outputs)}
    for layer in all_layers:
        dtypes = [layer.get_output(index).dtype.name for index in range(layer.num_outputs)]
        layers[layer.type.name] += 1
        tensors.update(dtypes)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY:
            origins = [_origin(layer.get_input(index), made_by) for index in range(layer.num_inputs)]
            products.update(["INT8"] if set(origins) == {"DEQUANTIZE"} else dtypes)
            attention += "SOFTMAX" in origins
    return Census(
        dict(sorted(layers.items())),
        dict(sorted(tensors.items())),
        dict(sorted(products.items())),
        products.total(),
        attention,
    )


def _origin(tensor: Any, made_by: Mapping[str, Any]) -> str:
    """The type of the layer that made a tensor, with those that only move its elements left out; "" for an input."""
    layer = made_by.get(tensor.name)
    while layer is not None and layer.type.name in MOVES:
        layer = made_by.get(layer.get_input(0).name)
    return "" if layer is None else str(layer.type.name)


def inspected(information: Mapping[str, Sequence[object]]) -> dict[str, object]:
    """What an engine computes in, of the engine inspector's JSON at detailed verbosity.

    Returns:
        inspected_products: the types that matrix products read → number of layers; fused_attention: how many layers are
        fused attention, to be compared with "attention_layers".
    """
    products: Counter[str] = Counter()
    fused = 0
    for entry in information.get("Layers", []):
        if not isinstance(entry, dict):  # at a lower verbosity a layer is its name
            continue
        says = " ".join(str(entry.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
        fused += bool(FUSED_ATTENTION.search(says))
        if PRODUCT.search(says):
            formats = " ".join(str(each.get(key, "")) for each in entry.get("Inputs", []) for key in FORMATS)
            products.update(name for name, words in TYPES.items() if re.search(words, formats, re.IGNORECASE))
    return {"inspected_products": dict(sorted(products.items())), "fused_attention": fused}
