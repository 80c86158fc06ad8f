"""LiteRT's format: one .tflite file with a signature for each batch that it takes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from toolchain.artifacts.base import Fact, Part, Reading, layer_and_part, port_facts
from toolchain.artifacts.engine import Engine
from toolchain.artifacts.inputs import Port, Signature
from toolchain.artifacts.onnx_file import UINT8
from toolchain.artifacts.onnx_layers import GRAPH
from toolchain.artifacts.tflite_reading import StoredTensor, TfliteModel, read_tflite
from toolchain.errors import ArtifactError, RecipeError
from toolchain.model import BATCH, Preprocess
from toolchain.outputs import Output, output_named

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
    def metadata(self) -> dict[str, Any]:
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
        return tuple(sorted({shape[0] or 1 for shape in self._shapes() if shape}))

    def _shapes(self) -> list[tuple[int | None, ...]]:
        return [tensor.shape for each in self.content.signatures for tensor in each.inputs.values()]

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; the batch is open where it has several."""
        return self._ports("inputs")

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs."""
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

    def signature(self, batch: int, sample: tuple[int, ...] | None = None) -> Signature:
        """Its inputs as they are fed; raises RecipeError for a batch that it has no signature for, and as its base does."""
        if batch not in self.batches:
            known = ", ".join(map(str, self.batches))
            raise RecipeError(
                f"{self.path} has a signature for batches of {known}, asked for {batch}; name it in engine.batch, and build again"
            )
        return super().signature(batch, sample)

    @property
    def preprocess(self) -> Preprocess | None:
        """The preprocessing that it declares."""
        told = self.metadata.get("preprocess")
        return None if told is None else Preprocess.from_dict(told)

    @property
    def output(self) -> Output | None:
        """The kind of output that it declares."""
        return output_named(self.metadata.get("output"))

    @property
    def own_pixels(self) -> bool:
        """Whether it declares that it takes uint8 pixels as slimvit writes them."""
        return bool(self.metadata.get("input") == UINT8)

    @property
    def precision(self) -> Reading:
        """That of its coarsest stored weight of a product, which its metadata may name closer."""
        kinds = self.weights
        name = next((precision for kind, precision in PRECISIONS.items() if kind in kinds), "")
        told = str(self.metadata.get("precision", ""))
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
        """The facts that `inspect` prints."""
        operators = Counter(node.op for node in self.content.graphs[0].nodes)
        return {
            **super().facts(),
            "params": self.params,
            "batches": list(self.batches),
            "inputs": port_facts(self.inputs),
            "outputs": port_facts(self.outputs),
            "nodes": dict(operators.most_common()),
            "metadata": {
                f"{METADATA}.{key}": value if isinstance(value, str) else json.dumps(value)
                for key, value in self.metadata.items()
            },
        }
