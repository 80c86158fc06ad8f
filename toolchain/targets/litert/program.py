"""An ONNX file as what the other interpreter converts: a torch program for each batch, and what its weights are called."""

from __future__ import annotations

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
from toolchain.artifacts.onnx_plain import Codes, plain
from toolchain.artifacts.onnx_walk import linked
from toolchain.errors import ArtifactError, RecipeError
from toolchain.interpreter import GraphModule, module_of

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
        halves: names of the weights that the ONNX file stores in fp16.
    """

    file: OnnxFile
    precision: str
    module: GraphModule
    weights: dict[str, Array]
    codes: dict[str, Codes]
    halves: frozenset[str]

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
        content = folded(content)
        stored = {
            each.name: numpy_helper.to_array(each)
            for each in content.model.graph.initializer
            if each.data_type == TensorProto.FLOAT and each.dims
        }
        return Source(
            file,
            "int8-dynamic" if content.codes else "fp16" if content.halves else FP32,
            module_of(content.model),
            {layers.get(name, name): array for name, array in stored.items()},
            {layers.get(name, name): codes for name, codes in content.codes.items()},
            frozenset(layers.get(name, name) for name in content.halves),
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
        """Writes what `convert_program.py` reads; raises RecipeError where an input leaves the shape of a sample open.

        Args:
            folder: where.
            batches: one signature for each.
            sample: shape of one sample, where the file leaves it open.
        """
        named = Named(self.module)
        for batch in batches:
            program = torch.export.export(named, (), self._inputs(batch, sample))
            if self.precision != FP32:
                program = program.run_decompositions({torch.ops.aten.layer_norm.default: scaled_norm})
            torch.export.save(program, folder / f"b{batch}.pt2")
        arrays = {f"weight:{name}": array for name, array in self.weights.items()}
        for name, codes in self.codes.items():
            arrays[f"codes:{name}"] = np.ascontiguousarray(codes.codes.T)
            arrays[f"scales:{name}"] = np.ascontiguousarray(codes.scales)
        np.savez(folder / "weights.npz", **arrays)  # type: ignore[arg-type]
        request = {
            "batches": list(batches),
            "precision": self.precision,
            "metadata": self.metadata,
        }
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")

    def _inputs(self, batch: int, sample: tuple[int, ...] | None) -> dict[str, Tensor]:
        signature = self.file.signature(batch, sample)
        if len(signature.names) != len(self.module.input_names):
            raise ArtifactError(f"{self.file.path} has inputs that its graph does not read")
        kinds = ["float32" if each.dtype == "float16" else each.dtype for each in signature.inputs]
        if unknown := sorted(set(kinds) - {"float32", "uint8", "int32", "int64"}):
            raise RecipeError(f"{self.file.path} takes {', '.join(unknown)}, which .tflite files are not built for")
        return {
            name: torch.zeros(each.shape, dtype=getattr(torch, kind))
            for name, each, kind in zip(signature.names, signature.inputs, kinds, strict=True)
        }


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
