"""Prepares an ONNX file for the converting interpreter: a torch program for each batch, and the names of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from toolchain.artifacts.onnx_file import FORM, FP32, OnnxFile
from toolchain.artifacts.onnx_folded import folded
from toolchain.artifacts.onnx_layers import named_weights
from toolchain.artifacts.onnx_plain import Codes, plain, weighted
from toolchain.artifacts.onnx_walk import linked
from toolchain.errors import ArtifactError, RecipeError
from toolchain.interpreter import GraphModule, module_of, traced
from toolchain.interpreter.operators import OPERATORS, Attributes, Value
from toolchain.parity import TOLERANCES

Array = NDArray[Any]


@dataclass(frozen=True)
class Source:
    """What a .tflite file is made from.

    Attributes:
        file: the ONNX file.
        precision: of the weights in the .tflite file: "fp32", "fp16" or "int8-dynamic".
        module: the graph in fp32, with the numbers of the file; what is constant around a linear is in its weight.
        weights: name in the .tflite file → its numbers, float32, as the ONNX file lays them out.
        codes: name in the .tflite file → int8 codes and scales of the linears that have them.
        constant_linears: int8 linears of the file whose output is a constant, which is what stands for them.
        halves: names of the weights that the ONNX file stores in fp16 and products read; a product of constants becomes one.
    """

    file: OnnxFile
    precision: str
    module: GraphModule
    weights: dict[str, Array]
    codes: dict[str, Codes]
    halves: frozenset[str]
    constant_linears: int = 0

    @staticmethod
    def of(path: Path) -> Source:
        """What is converted of a file.

        Raises:
            StorageError, ArtifactError: the file cannot be read, or holds what is not understood.
        """
        file = OnnxFile(path)
        _ = file.files  # all of them are there
        content = plain(onnx.load(path))
        layers = {name: ".".join(part) for name, part in named_weights(linked(content.model).graph)}
        int8 = len(content.codes)
        content = folded(content)
        stored = {
            each.name: numpy_helper.to_array(each)
            for each in content.model.graph.initializer
            if each.data_type == TensorProto.FLOAT and each.dims
        }
        return Source(
            file,
            "int8-dynamic" if content.codes else "fp16" if content.halves else FP32,
            module_of(content.model, {**OPERATORS, "Expand": repeated}),
            {layers.get(name, name): array for name, array in stored.items()},
            {layers.get(name, name): codes for name, codes in content.codes.items()},
            frozenset(layers.get(name, name) for name in content.halves & multiplied(content.model.graph)),
            int8 - len(content.codes),
        )

    @property
    def metadata(self) -> dict[str, object]:
        """What travels in the .tflite file: what the ONNX file says of its input and outputs, and the precision."""
        told = self.file.metadata
        preprocess, output = self.file.preprocess, self.file.output
        return {
            "precision": self.precision,
            **({"preprocess": preprocess.to_dict()} if preprocess else {}),
            **({"output": output} if output else {}),
            **({"input": told[FORM]} if FORM in told else {}),
        }

    def save(self, folder: Path, batches: Sequence[int], sample: tuple[int, ...] | None) -> None:
        """Writes what `convert_program.py` reads.

        Args:
            folder: where.
            batches: one signature for each.
            sample: shape of one sample, where the file leaves it open.

        Raises:
            RecipeError: an input leaves the shape of a sample open.
            ArtifactError: what is converted is not what the file computes.
        """
        named = Named(self.module)
        inputs = [self._inputs(batch, sample) for batch in batches]
        self._require_same(named, inputs[0])
        for batch, given in zip(batches, inputs, strict=True):
            with traced(self.file.path):
                program = torch.export.export(named, (), given)
                if self.precision != FP32:
                    program = program.run_decompositions({torch.ops.aten.layer_norm.default: scaled_norm})
            torch.export.save(program, folder / f"b{batch}.pt2")
        arrays: dict[str, Array] = {}
        for name, codes in self.codes.items():
            arrays[f"codes:{name}"] = np.ascontiguousarray(codes.codes.T)
            arrays[f"scales:{name}"] = np.ascontiguousarray(codes.scales)
        np.savez(folder / "weights.npz", **arrays)  # type: ignore[arg-type]
        names: dict[str, str] = {}
        for name, array in self.weights.items():
            for each in layouts(array):
                names.setdefault(hashlib.sha256(each.tobytes()).hexdigest(), name)
        request = {
            "batches": list(batches),
            "precision": self.precision,
            "metadata": self.metadata,
            "names": names,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")

    def _require_same(self, converted: Named, inputs: dict[str, Tensor]) -> None:
        """Raises ArtifactError where the graph gives other outputs than before what is constant was taken into its linears."""
        with traced(self.file.path), torch.inference_mode():
            expected = Named(module_of(plain(onnx.load(self.file.path)).model))(**inputs)
            got = converted(**inputs)
        bound = TOLERANCES[FP32].max_abs or 0.0
        for name, y in expected.items():
            error = float((got[name] - y).abs().max())
            if not error <= bound * max(1.0, float(y.abs().max())):
                raise ArtifactError(
                    f"{self.file.path}: with what is constant taken into its linears, {name} is {error:.3g} off; please report it"
                )

    def _inputs(self, batch: int, sample: tuple[int, ...] | None) -> dict[str, Tensor]:
        """Noise as the file takes it, the same every time."""
        signature = self.file.signature(batch, sample)
        if len(signature.names) != len(self.module.input_names):
            raise ArtifactError(f"{self.file.path} has inputs that its graph does not read")
        kinds = ["float32" if each.dtype == "float16" else each.dtype for each in signature.inputs]
        if unknown := sorted(set(kinds) - {"float32", "uint8", "int32", "int64"}):
            raise RecipeError(f"{self.file.path} takes {', '.join(unknown)}, which .tflite files are not built for")
        noise = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(each.shape, generator=noise)
            if kind == "float32"
            else torch.randint(256, each.shape, generator=noise, dtype=getattr(torch, kind))
            for name, each, kind in zip(signature.names, signature.inputs, kinds, strict=True)
        }


def multiplied(graph: onnx.GraphProto) -> frozenset[str]:
    """The initializers that products of what depends on an input multiply by; a shape depends on none, once the batch is known."""
    varying = {each.name for each in graph.input} - {each.name for each in graph.initializer}
    for node in graph.node:
        if node.op_type != "Shape" and not varying.isdisjoint(node.input):
            varying.update(node.output)
    return frozenset(name for node, name in weighted(graph) if node.input[0] in varying)


def layouts(weight: Array) -> tuple[Array, ...]:
    """An ONNX weight as LiteRT may have it.

    A linear's lies [out, in]. A convolution's [out, in, height, width] lies [out, height, width, in], or where each output reads
    one channel, as of a grey image, [1, height, width, out].
    """
    if weight.ndim != 4:
        return weight, weight.T
    return weight.transpose(0, 2, 3, 1), *((weight.transpose(1, 2, 3, 0),) if weight.shape[1] == 1 else ())


def repeated(attributes: Attributes, x: Tensor, shape: Value) -> Tensor:
    """An Expand as copies beside each other.

    Of what is repeated as Expand does, and transposed then, as a key that all heads share, litert-converter makes a reshape.
    """
    wanted = OPERATORS["Expand"](attributes, x.new_empty(x.shape, device="meta"), shape).shape
    x = x.reshape(*(1,) * (len(wanted) - x.ndim), *x.shape)
    for axis, size in enumerate(wanted):
        x = x if x.shape[axis] == size else torch.cat([x] * size, axis)
    return x


def scaled_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, epsilon: float = 1e-5, _: bool = True
) -> Tensor:
    """LayerNorm over the last axes, with its weight multiplied by 1/σ before x is.

    Where x is multiplied by the weight last, the converter multiplies it into the linear that follows, whose rounded numbers are then
    no longer those of the file.
    """
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon) * weight
    return centred * scale + bias


class Named(nn.Module):
    """A graph that takes and gives tensors by the names of its file, which become those of the signatures."""

    def __init__(self, computed: GraphModule) -> None:
        super().__init__()
        self.computed = computed

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Output name → tensor."""
        outputs = self.computed(*(inputs[name] for name in self.computed.input_names))
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(self.computed.output_names, parts, strict=True))
