"""ncnn's format: a graph as text, and the weights in a file of the same name that ends in .bin."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from toolchain.artifacts.base import Fact, Part, Reading, coarsest_of
from toolchain.artifacts.engine import Engine
from toolchain.artifacts.inputs import Port
from toolchain.artifacts.ncnn_format import (
    MAGIC,
    Layer,
    Numbers,
    files_of,
    inputs_of,
    left_over,
    read_layers,
    read_numbers,
)

PRECISIONS = {"i8": "int8", "f16": "fp16", "f32": "fp32"}
"""Types of numbers, coarsest first, and the precisions that they make."""
COMPUTES_NOTHING = ("Input", "Split", "MemoryData")


@dataclass(frozen=True)
class NcnnModel(Engine):
    """A .param and its .bin, read without ncnn. ncnn knows no batch: what it takes and gives is one sample."""

    name: ClassVar[str] = "ncnn"
    word: ClassVar[str] = "ncnn model"
    patterns: ClassVar[tuple[str, ...]] = ("*.param", "*.bin")

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a .param begins as ncnn's do."""
        if not super().recognises(path):
            return False
        with path.open("rb") as file:
            return file.readline(32).strip() == MAGIC.encode()

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Both files; raises StorageError where one is missing."""
        return files_of(self.path)

    @cached_property
    def graph(self) -> tuple[Layer, ...]:
        """The layers of the .param."""
        return read_layers(self.path)

    @cached_property
    def _stored(self) -> tuple[tuple[Numbers, ...], int]:
        return read_numbers(self.graph, self.files[0])

    @property
    def weights(self) -> tuple[Numbers, ...]:
        """What its layers hold, up to the first whose format is not known."""
        return self._stored[0]

    @property
    def precision(self) -> Reading:
        """The coarsest type that its matrices are stored in: what it computes in is for the target to say."""
        held = Counter(each.type for each in self.weights if each.is_matrix)
        return coarsest_of(held, PRECISIONS)

    @property
    def params(self) -> int:
        """The numbers that its layers hold."""
        return sum(each.count for each in self.weights)

    @property
    def nodes(self) -> int:
        """Its layers that compute something."""
        return sum(layer.kind not in COMPUTES_NOTHING for layer in self.graph)

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs, at the one batch that there is; of unknown shape where another tool wrote the file."""
        return inputs_of(self.graph)

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs, with the shapes that engine.json has."""
        shapes = self.record.get("outputs")
        known = shapes if isinstance(shapes, dict) else {}
        return tuple(
            Port(blob, "float32", tuple(shape) if isinstance(shape := known.get(blob), list) else None)
            for blob in left_over(self.graph)
        )

    @property
    def parts(self) -> Counter[Part]:
        """(layer, part of it) → bytes of what it holds."""
        parts = Counter[Part]()
        for each in self.weights:
            parts[each.layer, each.part] += each.size_bytes
        parts["(graph)", "nodes"] += self.path.stat().st_size
        parts[f"(file {self.files[0].name})", "of other layers"] += self._stored[1]
        return +parts

    def facts(self) -> dict[str, Fact]:
        return {
            **super().facts(),
            "params": self.params,
            **self.graph_facts(Counter(layer.kind for layer in self.graph)),
        }
