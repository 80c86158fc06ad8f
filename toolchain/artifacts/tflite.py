"""LiteRT's format: one .tflite file with a signature for each batch that it takes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from toolchain.artifacts.base import Fact, Part, Reading, layer_and_part
from toolchain.artifacts.engine import Engine
from toolchain.artifacts.inputs import Port
from toolchain.artifacts.onnx_file import UINT8
from toolchain.artifacts.onnx_layers import GRAPH
from toolchain.artifacts.tflite_reading import StoredTensor, TfliteModel, read_tflite
from toolchain.errors import ArtifactError
from toolchain.model import BATCH

METADATA = "slimvit"
"""Metadata entry that holds the metadata of slimvit's ONNX file, as JSON."""
PRECISIONS = {"int4": "int4", "int8": "int8", "float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
"""Types of stored weights, coarsest first, and the precisions that they make."""
AUTOMATIC = re.compile(r"arith\.|.*[/;]|[^.]*$")
"""How the converter calls what no weight of an ONNX file is."""
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Tflite(Engine):
    """A .tflite file, read without running it."""

    name: ClassVar[str] = "tflite"
    word: ClassVar[str] = ".tflite file"
    patterns: ClassVar[tuple[str, ...]] = ("*.tflite",)

    @cached_property
    def content(self) -> TfliteModel:
        """Its parsed content."""
        return read_tflite(self.path)

    @cached_property
    def declared(self) -> dict[str, Any]:
        """Its metadata; empty if slimvit did not write it."""
        raw = self.content.metadata.get(METADATA, b"{}")
        try:
            told = json.loads(raw)
        except ValueError as error:
            raise ArtifactError(f"{self.path} has damaged metadata: {METADATA}: {error}") from None
        return told if isinstance(told, dict) else {}

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches that it takes, one signature each; an open one is 1 as long as nobody resizes it."""
        shapes = [tensor.shape for each in self.content.signatures for tensor in each.inputs.values()]
        return tuple(sorted({shape[0] or 1 for shape in shapes if shape}))

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; the batch is open where it has several."""
        return self._ports("inputs")

    @property
    def outputs(self) -> tuple[Port, ...]:
        return self._ports("outputs")

    def _ports(self, side: str) -> tuple[Port, ...]:
        signatures = self.content.signatures
        if not signatures:
            raise ArtifactError(f"{self.path} has no signature, which names what it takes and gives")
        tensors: dict[str, StoredTensor] = getattr(signatures[0], side)
        open_batch = len(self.batches) > 1
        return tuple(
            Port(name, each.type, (BATCH if open_batch else each.shape[0], *each.shape[1:]) if each.shape else ())
            for name, each in tensors.items()
        )

    @property
    def own_pixels(self) -> bool:
        """Whether it declares that it takes uint8 pixels as slimvit writes them."""
        return bool(self.declared.get("input") == UINT8)

    @property
    def precision(self) -> Reading:
        """That of its coarsest stored weight of a product, which its metadata may name closer."""
        kinds = self.weights
        name = next((precision for kind, precision in PRECISIONS.items() if kind in kinds), "")
        told = str(self.declared.get("precision", ""))
        if told and told.partition("-")[0] == name:
            return Reading(told)
        held = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        return Reading(name, f"the weights of its products are {held or 'nothing'}")

    @cached_property
    def weights(self) -> Counter[str]:
        """Type → how many products of its first graph have a stored weight of it."""
        graph = self.content.graphs[0]
        found = filter(None, map(graph.weight, graph.nodes))
        return Counter(weight.type for weight in found)

    @property
    def params(self) -> int:
        """The numbers stored in its tensors, without scalars and indices; those that graphs share count once."""
        return sum(
            math.prod(size or 0 for size in each.shape)
            for each in self.content.stored
            if each.shape and (each.type in FLOATS or len(each.scales))
        )

    @property
    def nodes(self) -> int:
        """The operators of its first graph."""
        return len(self.content.graphs[0].nodes)

    @property
    def parts(self) -> Counter[Part]:
        """(layer, part of it) → bytes of what is stored; scales are counted with the graph."""
        parts = Counter[Part]()
        for each in self.content.stored:
            assert each.data is not None
            unnamed = AUTOMATIC.match(each.name)
            parts[(GRAPH, "constants") if unnamed else layer_and_part(each.name)] += each.data.size
        parts[GRAPH, "nodes and metadata"] += self.size_bytes - parts.total()
        return parts

    def facts(self) -> dict[str, Fact]:
        operators = Counter(node.op for node in self.content.graphs[0].nodes)
        return {
            **super().facts(),
            "params": self.params,
            "batches": list(self.batches),
            **self.graph_facts(operators),
            "metadata": {
                f"{METADATA}.{key}": value if isinstance(value, str) else json.dumps(value)
                for key, value in self.declared.items()
            },
        }
