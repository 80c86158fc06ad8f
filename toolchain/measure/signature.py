"""The inputs that an artifact takes, with the batch and shape of a scenario put in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.export.inputs import fixed_size_hint, shown
from toolchain.files import read_json
from toolchain.measure.samples import InputSpec
from toolchain.targets.eager import INPUT

MODEL_RECORD = "model.json"


@dataclass(frozen=True)
class Signature:
    """An artifact's input names, and what is fed to them."""

    names: tuple[str, ...]
    inputs: tuple[InputSpec, ...]

    def fits(self, other: Signature) -> bool:
        """Whether the same values can be fed to both: of equal shapes and types, or of floats that differ in their bits."""
        return len(self.inputs) == len(other.inputs) and all(
            ours.shape == theirs.shape
            and (ours.dtype == theirs.dtype or {np.dtype(ours.dtype).kind, np.dtype(theirs.dtype).kind} == {"f"})
            for ours, theirs in zip(self.inputs, other.inputs, strict=True)
        )


def read_signature(path: Path, batch: int, input_shape: tuple[int, ...] | None = None) -> Signature:
    """The inputs of an ONNX file or a model folder.

    Args:
        path: the artifact.
        batch: what the first dimension of every input is to be.
        input_shape: shape of one sample, without the batch; needed where a file leaves it open.

    Raises:
        StorageError: there is no such artifact.
        ArtifactError: it is damaged.
        RecipeError: it fixes another batch or shape than asked, or leaves a shape open that was not given.
    """
    if not path.exists():
        raise StorageError(f"there is no file or folder {path}")
    if path.is_dir():
        return _of_folder(path, batch, input_shape)
    if path.suffix == ".onnx":
        return _of_onnx(path, batch, input_shape)
    raise RecipeError(f"cannot tell the inputs of {path}; expected an .onnx file or a model folder")


def _of_folder(path: Path, batch: int, input_shape: tuple[int, ...] | None) -> Signature:
    record = read_json(path / MODEL_RECORD)
    size = record.get("input_size") if isinstance(record, dict) else None
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise ArtifactError(f"{path / MODEL_RECORD} has input_size {size!r}; expected [C, H, W]")
    if input_shape not in (None, tuple(size)):
        raise RecipeError(f"{path} takes images of shape {size}, asked for {list(input_shape or ())}")
    return Signature((INPUT,), (InputSpec(shape=(batch, *size), dtype="float32"),))


def _of_onnx(path: Path, batch: int, input_shape: tuple[int, ...] | None) -> Signature:
    graph = read_onnx(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    values = [value for value in graph.input if value.name not in weights]
    if not values:
        raise ArtifactError(f"{path} has no input; there is nothing to feed")
    if input_shape is not None and len(values) > 1:
        raise RecipeError(f"{path} has {len(values)} inputs; one --input-shape cannot serve them all")
    specs = tuple(_spec(path, value, batch, input_shape) for value in values)
    return Signature(tuple(value.name for value in values), specs)


def _spec(path: Path, value: onnx.ValueInfoProto, batch: int, input_shape: tuple[int, ...] | None) -> InputSpec:
    tensor = value.type.tensor_type
    where = f"input {value.name!r} of {path}"
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    except KeyError:
        raise ArtifactError(f"{where} is no tensor of a known type") from None
    if dtype.kind not in "fiub" or dtype not in np.sctypeDict.values():
        raise RecipeError(f"{where} has type {dtype}; inputs of float, integer or boolean type can be generated")
    declared = [dim.dim_value or None for dim in tensor.shape.dim]
    if not declared:
        raise RecipeError(f"{where} has no batch dimension; it cannot be timed at a batch")
    if declared[0] not in (None, batch):
        raise RecipeError(
            f"{where} has a fixed batch of {declared[0]}, asked for {batch}; pass --batch {declared[0]} (batch of a gate's cell), or "
            "export it with a dynamic batch"
        )
    asked = list(input_shape) if input_shape is not None else declared[1:]
    fits = len(asked) == len(declared) - 1 and all(d in (None, a) for d, a in zip(declared[1:], asked, strict=False))
    if not fits:
        hint = fixed_size_hint(tuple(declared[1:]), tuple(asked))
        raise RecipeError(f"{where} takes {shown(tuple(declared[1:]))} per sample, asked for {asked}{hint}")
    if None in asked:
        raise RecipeError(
            f"{where} leaves its shape open, {shown(tuple(declared[1:]))} per sample; name it with --input-shape, e.g. "
            "--input-shape 3,224,224 (input_shape of a gate's cell)"
        )
    return InputSpec(shape=(batch, *(n for n in asked if n is not None)), dtype=dtype.name)
