"""A model folder: weights as safetensors, and the model.json that describes the model."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from toolchain.artifacts.base import Artifact, Fact, Part, Reading, layer_and_part, require_bytes
from toolchain.artifacts.inputs import Port
from toolchain.errors import ArtifactError, RecipeError
from toolchain.files import reading
from toolchain.model import BATCH, IMAGE, ModelRecord, Preprocess
from toolchain.outputs import CLASS_NAMES, Output, output_names
from toolchain.plan import CompressionPlan

RECORD, WEIGHTS = "model.json", ".safetensors"


@dataclass(frozen=True)
class ModelFolder(Artifact):
    """A folder of safetensors. Of a folder that slimvit did not write, only bytes and parameters are known."""

    name: ClassVar[str] = "model-folder"
    word: ClassVar[str] = "model folder"
    patterns: ClassVar[tuple[str, ...]] = (RECORD, f"*{WEIGHTS}", "plan.json", "allocation.json")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a path is a folder with a model's record, or safetensors, alone or anywhere below a folder."""
        if not path.is_dir():
            return path.suffix == WEIGHTS
        return (path / RECORD).is_file() or any(path.rglob(f"*{WEIGHTS}"))

    @cached_property
    def record(self) -> ModelRecord:
        """The content of model.json."""
        return ModelRecord.load(self.path / RECORD)

    @cached_property
    def tensors(self) -> dict[Path, dict[str, tuple[tuple[int, ...], int]]]:
        """File of safetensors → tensor → (shape, bytes)."""
        return {file: safetensors_shapes(file) for file in self.files if file.suffix == WEIGHTS}

    @property
    def params(self) -> int:
        """The numbers stored in its tensors."""
        if not self.tensors:
            raise RecipeError(f"{self.path} holds no safetensors, so that its parameters cannot be counted")
        return sum(math.prod(shape) for tensors in self.tensors.values() for shape, _ in tensors.values())

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Images, one batch of any size."""
        return (Port(IMAGE, "float32", (BATCH, *self.preprocess.input_size)),)

    @property
    def outputs(self) -> tuple[Port, ...]:
        """One row of numbers per image; of tokens the rank is that of the model."""
        ref, output = self.record.model, self.output or "logits"
        shape = None if output in ("tokens", "layers") else (BATCH, None)
        return tuple(Port(name, "float32", shape) for name in output_names(output, ref.layers))

    @property
    def preprocess(self) -> Preprocess:
        """How images become its input."""
        return self.record.preprocess

    @property
    def output(self) -> Output | None:
        """The kind of output that its recipe declared."""
        return self.record.model.output

    @property
    def class_names(self) -> tuple[str, ...]:
        """What its outputs stand for, where that was known."""
        names = self.record.provenance.get(CLASS_NAMES)
        return tuple(map(str, names)) if isinstance(names, list) else ()

    @property
    def precision(self) -> Reading:
        """Always fp32: stored tensors of other types are converted when it is loaded."""
        return Reading("fp32")

    @property
    def parts(self) -> Counter[Part]:
        """(layer, part of it) → bytes; what is no tensor is a layer that is called by its file."""
        parts: Counter[Part] = Counter()
        for file in self.files:
            name, of_file = f"(file {file.relative_to(self.path).as_posix()})", Counter[Part]()
            for tensor, (_, size) in self.tensors.get(file, {}).items():
                of_file[layer_and_part(tensor)] += size
            of_file[name, "header" if file in self.tensors else ""] += file.stat().st_size - of_file.total()
            parts.update(of_file)
        return parts

    def facts(self) -> dict[str, Fact]:
        if not (self.path / RECORD).is_file():
            return {**super().facts(), "params": self.params}
        from toolchain.cost import trace
        from toolchain.surgery.replay import create_dense, load_model  # torch, which what only measures does not load

        record, model = self.record, load_model(self.path)
        shape = trace(model.module, model.family, model.preprocess.input_size)
        return {
            **super().facts(),
            "kind": f"{record.stage} model",
            "model": record.model.name,
            "kwargs": record.model.kwargs,
            **({} if record.model.output is None else {"output": record.model.output}),
            **({} if not record.model.layers else {"layers": list(record.model.layers)}),
            "params": shape.params,
            "macs": shape.macs,
            "input_size": list(record.preprocess.input_size),
            "provenance": record.provenance,
            "restrictions": model.family.restrictions(create_dense(record.model)),
            "structure": record.structure,
            **({} if record.plan is None else {"plan": CompressionPlan.from_dict(record.plan).summary()}),
        }


def safetensors_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Tensor → (shape, bytes) from a safetensors file's header; raises ArtifactError if it has none, or tensors are cut off."""
    try:
        with reading(path), path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)  # of another file it is anything
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        require_bytes(path, end, f"its header names {end:,}")
        return {
            name: (tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} is not a safetensors file, or is truncated: {error}") from None
