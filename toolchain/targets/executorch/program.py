"""An ONNX file as a program of ExecuTorch: exported for each batch, quantised where the file is, and given to XNNPACK."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnxlib
import torch
from torch import fx
from torch.export import ExportedProgram

from toolchain.artifacts.inputs import Signature
from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.artifacts.onnx_plain import Codes, Plain, plain, weighted
from toolchain.errors import ArtifactError, RecipeError
from toolchain.foreign import reason
from toolchain.interpreter import GraphModule, module_of, traced
from toolchain.interpreter.operators import OPERATORS
from toolchain.on_device.runner import PTE_FORM, PTE_NAMES
from toolchain.targets.executorch.int8 import original, require_codes, require_scales, with_codes
from toolchain.targets.executorch.operators import REWRITES
from toolchain.targets.executorch.reading import FLOAT, INT8, Linear, linears_of

FORWARD = "forward"
"""The method of the smallest batch, which is what other programs call when they name none; those of others begin with it."""
LINEARS = ("aten_linear_default", "aten_addmm_default", "aten_mm_default")
"""How nodes are called that are linears, if they read a weight."""
MOVES = ("aten_permute_copy", "aten_view_copy", "aten_t_copy", "quantized_decomposed_dequantize_per_channel")
"""Nodes through which the weight of a linear is looked for."""


@dataclass(frozen=True)
class Method:
    """One method of the program: the graph at one batch size.

    Attributes:
        name: of the method in the file.
        delegates: how many parts XNNPACK computes; each of them ends where an operator is not its own.
        outside: operator → how many are left to ExecuTorch's portable kernels.
    """

    name: str
    delegates: int
    outside: dict[str, int]


@dataclass(frozen=True)
class Program:
    """A program and what is known of it.

    Attributes:
        content: the bytes of the .pte file.
        methods: batch → its method.
        products: type of matrix product, as engine.json has it → how many linears with it XNNPACK computes in each method.
    """

    content: bytes
    methods: dict[int, Method]
    products: dict[str, int]


def program_of(path: Path, batches: Sequence[int], sample: tuple[int, ...] | None = None) -> Program:
    """The program of an ONNX file in fp32 or with dynamic int8 linears, one method for each batch; they share their weights.

    Args:
        path: the file.
        batches: those that it takes.
        sample: shape of one sample, where the file leaves it open.

    Raises:
        StorageError, ArtifactError: the file cannot be read, an operator is not understood, a linear is left outside of XNNPACK,
            or the int8 numbers are not those of the file.
        RecipeError: the file is of another precision, or leaves the shape of a sample open.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    file = OnnxFile(path)
    _ = file.files  # all of them are there
    content = plain(onnxlib.load(path))
    if content.halves:
        raise RecipeError(f"{path} holds 16-bit weights; .pte files are built from fp32 and int8-dynamic")
    for name, each in content.codes.items():
        require_scales(name, each)
    module = module_of(content.model, {**OPERATORS, **REWRITES})
    codes = {attribute: content.codes[name] for attribute, name in module.stored.items() if name in content.codes}
    batches = sorted(set(batches))
    names = {batch: FORWARD if batch == batches[0] else f"{FORWARD}_{batch}" for batch in batches}
    signatures = {batch: file.signature(batch, sample) for batch in batches}
    description = _description(file, module, "int8-dynamic" if codes else FP32, batches, signatures[batches[0]])
    exported = {names[batch]: _exported(path, module, signatures[batch], codes) for batch in batches}
    try:
        edge = to_edge_transform_and_lower(
            exported, partitioner=[XnnpackPartitioner()], constant_methods={PTE_NAMES: json.dumps(description)}
        )
        methods = {
            batch: _method(path, name, edge.exported_program(name), module.stored) for batch, name in names.items()
        }
        lowered = bytes(edge.to_executorch().buffer)
        linears = linears_of(lowered)
    except ArtifactError:
        raise
    except Exception as error:  # the converter's own, of any class
        raise ArtifactError(f"ExecuTorch cannot lower {path}: {reason(error)}") from error
    return Program(lowered, methods, _products(path, {name: linears[name] for name in names.values()}, content))


def _exported(path: Path, module: GraphModule, signature: Signature, codes: Mapping[str, Codes]) -> ExportedProgram:
    """The graph at the shapes of one batch."""
    by_name = dict(zip(signature.names, signature.inputs, strict=True))
    feeds = tuple(torch.from_numpy(np.ones(by_name[name].shape, by_name[name].dtype)) for name in module.input_names)
    with traced(path):
        exported = torch.export.export(module, feeds)
        if codes:
            exported = with_codes(exported, feeds, codes)
    return exported


def _method(path: Path, name: str, program: ExportedProgram, stored: Mapping[str, str]) -> Method:
    """What became of one method; raises ArtifactError where XNNPACK leaves a linear out."""
    from executorch.devtools.backend_debug import get_delegation_info

    weights = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    for node in program.graph.nodes:
        weight = _weight(node, weights) if node.name.startswith(LINEARS) else None
        if weight is not None:
            raise ArtifactError(
                f"{path.name}: XNNPACK does not take the linear of {stored.get(original(weight), weight)!r}, which would run on "
                "ExecuTorch's portable kernels, many times slower"
            )
    info = get_delegation_info(program.graph_module)
    outside = {
        kind: each.non_delegated
        for kind, each in sorted(info.delegation_by_operator.items())
        if each.non_delegated and kind != "getitem"
    }
    return Method(name, info.num_delegated_subgraphs, outside)


def _weight(node: fx.Node, weights: Mapping[str, str]) -> str | None:
    """The parameter or buffer that a product reads, as it is or turned; None for a product of two activations."""
    for each in node.all_input_nodes:
        source = each
        while source.name.startswith(MOVES):
            source = source.all_input_nodes[0]
        if source.name in weights:
            return weights[source.name]
    return None


def _products(path: Path, linears: Mapping[str, Sequence[Linear]], content: Plain) -> dict[str, int]:
    """Type of matrix product → how many linears with it each method has; raises ArtifactError unless all have those of the file.

    Of int8 linears the integers are compared, of those in fp32 the number; where each of them stands, parity tells.
    """
    weights = [name for node, name in weighted(content.model.graph) if node.op_type != "Conv"]
    int8 = [(name, content.codes[name]) for name in weights if name in content.codes]
    wanted = Counter({INT8: len(int8), FLOAT: len(weights) - len(int8)})
    for name, found in linears.items():
        where = f"{path.name}, method {name}"
        require_codes(where, found, int8)
        if (counts := Counter(each.kind for each in found)) != wanted:
            raise ArtifactError(
                f"{where}: XNNPACK multiplies by weights of {dict(counts)}, the ONNX file by {dict(+wanted)}"
            )
    return dict(+wanted)


def _description(
    file: OnnxFile, module: GraphModule, precision: str, batches: Sequence[int], signature: Signature
) -> dict[str, Any]:
    """What a file says of itself: names and types by position, and how images become its input."""
    specs = dict(zip(signature.names, signature.inputs, strict=True))
    open_batch = len(batches) > 1
    inputs = [
        {
            "name": name,
            "type": specs[name].dtype,
            "shape": [None if open_batch else specs[name].shape[0], *specs[name].shape[1:]],
        }
        for name in module.input_names
    ]
    how = file.preprocess
    return {
        **PTE_FORM,
        "precision": precision,
        "batches": list(batches),
        "inputs": inputs,
        "outputs": list(module.output_names),
        "preprocess": None if how is None else how.to_dict(),
        "output": file.output,
        "own_pixels": file.own_pixels,
    }
