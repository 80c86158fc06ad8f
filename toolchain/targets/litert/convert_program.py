"""torch programs → one .tflite, in an interpreter that has torch and litert-torch. It imports nothing of the project.

Usage: `python convert_program.py FOLDER`. FOLDER holds request.json, weights.npz and, for each batch of the request, a program
`b<batch>.pt2` that takes and gives tensors by name; the file is written there as model.tflite.

request.json: `batches`; `precision`, "fp32", "fp16" or "int8-dynamic"; `metadata`, an object that travels in the file under the name
"slimvit"; `names`, SHA-256 of the numbers of a stored weight as the converter may lay them out, float32 → the name that the
tensor which holds them gets. weights.npz: under `codes:<name>` and `scales:<name>` int8 codes [out, in] and scales [out] of
those that are stored as such.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import litert_torch
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from ai_edge_quantizer import qtyping, quantizer, recipe_manager
from ai_edge_quantizer.algorithm_manager import AlgorithmName

METADATA = "slimvit"
LINEAR = schema.BuiltinOperator.FULLY_CONNECTED


def main(folder: Path) -> None:
    """Writes model.tflite; raises SystemExit with the reason where that cannot be."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    with np.load(folder / "weights.npz") as file:
        arrays = dict(file)
    path = folder / "fp32.tflite"
    converted(folder, request["batches"]).export(str(path))
    model = flatbuffer_utils.read_model(path)
    names = weight_names(model, request["names"])
    recipe = recipe_of(request["precision"], model, names, arrays)
    if recipe:
        rounded = folder / "rounded.tflite"
        quantizer.Quantizer(str(path), recipe).quantize().export_model(str(rounded))
        model = flatbuffer_utils.read_model(rounded)
    rename(model, names)
    put_codes(model, arrays)
    put_metadata(model, json.dumps(request["metadata"], separators=(",", ":")).encode())
    flatbuffer_utils.write_model(model, folder / "model.tflite")


def converted(folder: Path, batches: list[int]) -> Any:
    """LiteRT's model with one signature for each batch. Constants are folded, or what a batch repeats would stay outside XNNPACK."""
    converter: Any = litert_torch
    for batch in batches:
        program = torch.export.load(folder / f"b{batch}.pt2")
        inputs = program.example_inputs
        assert inputs is not None
        converter = converter.signature(f"b{batch}", program.module(), sample_kwargs=inputs[1])
    return converter.convert(runtime_constant_folding=True)


def weight_names(model: Any, names: dict[str, str]) -> dict[str, str]:
    """The converter's name of a tensor, which no other has in any graph → that of the weight whose numbers it has."""
    found: dict[str, str] = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None:
                digest = hashlib.sha256(np.asarray(data, np.uint8).tobytes()).hexdigest()
                found |= {tensor.name.decode(): names[digest]} if digest in names else {}
    return found


def rename(model: Any, names: dict[str, str]) -> None:
    """Gives tensors the names of their weights."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            tensor.name = names.get(tensor.name.decode(), tensor.name.decode()).encode()


def recipe_of(precision: str, model: Any, names: dict[str, str], arrays: dict[str, Any]) -> Any:
    """What the quantiser is told: every stored matrix in fp16, or the linears that have codes in int8; None for fp32.

    Raises:
        SystemExit: a linear that has codes is not in the file as it was given.
    """
    manager = recipe_manager.RecipeManager()
    if precision == "fp16":
        manager.add_weight_only_config(
            ".*", qtyping.TFLOperationName.ALL_SUPPORTED, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING
        )
        return manager.get_quantization_recipe()
    if precision != "int8-dynamic":
        return None
    coded = {key[len("codes:") :] for key in arrays if key.startswith("codes:")}
    for graph in model.subgraphs:
        left = set(coded)
        for op in graph.operators:
            code = flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[op.opcodeIndex])
            weight = names.get(graph.tensors[op.inputs[1]].name.decode()) if code == LINEAR else None
            if weight in coded:
                left.discard(weight)
                scope = re.escape(graph.tensors[op.outputs[0]].name.decode())
                manager.add_dynamic_config(f"^{scope};$", qtyping.TFLOperationName.FULLY_CONNECTED, num_bits=8)
        if left:
            sys.exit(
                f"the converter changed the weights of {', '.join(sorted(left))}, so their int8 codes have no place"
            )
    return manager.get_quantization_recipe()


def put_codes(model: Any, arrays: dict[str, Any]) -> None:
    """The very codes and scales of the request, where the quantiser put its own: it rounds to the whole range of int8."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            codes = arrays.get(f"codes:{tensor.name.decode()}")
            if codes is None:
                continue
            if tensor.type != schema.TensorType.INT8 or list(tensor.shape) != list(codes.shape):
                sys.exit(f"the quantiser left {tensor.name.decode()} as it was")
            scales = arrays[f"scales:{tensor.name.decode()}"]
            model.buffers[tensor.buffer].data = codes.view(np.uint8).reshape(-1)
            tensor.quantization.scale = scales.astype(np.float32)
            tensor.quantization.zeroPoint = np.zeros(len(scales), np.int64)
            tensor.quantization.quantizedDimension = 0


def put_metadata(model: Any, content: bytes) -> None:
    """Adds an entry; the runtime reads those that it knows by name."""
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(content, np.uint8)
    entry = schema.MetadataT()
    entry.name, entry.buffer = METADATA, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
