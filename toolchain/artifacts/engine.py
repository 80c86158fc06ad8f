"""An engine that a target built from an ONNX file, and the engine.json beside it that describes the build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from toolchain.artifacts.base import Artifact, Fact, Reading
from toolchain.artifacts.inputs import Signature
from toolchain.errors import ArtifactError, RecipeError
from toolchain.files import read_json
from toolchain.model import Preprocess
from toolchain.outputs import Output, output_named

RECORD = "engine.json"
PREPROCESS, OUTPUT = "preprocess", "output"
"""Keys of engine.json: the preprocessing and the kind of output that the ONNX file declared."""
PRODUCTS = {"INT8": "int8", "INT8-DYNAMIC": "int8-dynamic", "BF16": "bf16", "HALF": "fp16", "FLOAT": "fp32"}
"""The types of matrix products in engine.json, coarsest first, and the precisions that they make."""


@dataclass(frozen=True)
class Engine(Artifact):
    """An artifact with an engine.json beside it; of a foreign engine, which has none, only the bytes are known."""

    @cached_property
    def record(self) -> dict[str, Fact]:
        """The content of engine.json; empty if there is none, or if it describes another engine."""
        beside = self.path.with_name(RECORD)
        if not beside.is_file():
            return {}
        found = read_json(beside)
        if not isinstance(found, dict):
            raise ArtifactError(f"{beside} is no record of an engine")
        return found if found.get("engine") == self.path.name else {}

    def require_whole(self) -> None:
        """Raises ArtifactError where it has another size than engine.json says, and as its base does."""
        told, there = self.record.get("size_bytes"), self.size_bytes
        if isinstance(told, int) and there != told:
            raise ArtifactError(
                f"{self.path} has {there:,} bytes, and the {RECORD} beside it tells of {told:,}: it is truncated, or another engine "
                "was put in its place; build it again"
            )
        super().require_whole()

    @property
    def precision(self) -> Reading:
        """The precision of its coarsest matrix product, from engine.json."""
        products = self.record.get("matmul_dtypes")
        if not isinstance(products, dict) or not products:
            return Reading("", f"no {RECORD} beside it tells its matrix products")
        name = next((precision for kind, precision in PRODUCTS.items() if kind in products), "")
        counts = ", ".join(f"{kind} {count}" for kind, count in products.items())
        return Reading(name, f"its matrix products are {counts}, as {RECORD} says")

    @property
    def declared(self) -> Mapping[str, Any]:
        """What it says of the ONNX file that it was made from: by itself, or in the engine.json beside it."""
        return self.record

    @property
    def preprocess(self) -> Preprocess | None:
        """The preprocessing that its ONNX file declared."""
        said = self.declared.get(PREPROCESS)
        return None if said is None else Preprocess.from_dict(said)

    @property
    def output(self) -> Output | None:
        """The kind of output that its ONNX file declared."""
        return output_named(self.declared.get(OUTPUT))

    @property
    def batches(self) -> tuple[int, ...] | None:
        """The only batches that it was built for; None where it says nothing of them."""
        return None

    def signature(self, batch: int, sample: tuple[int, ...] | None = None) -> Signature:
        """As its base does; raises RecipeError also for a batch that it was not built for."""
        if self.batches is not None and batch not in self.batches:
            known = ", ".join(map(str, self.batches))
            raise RecipeError(
                f"{self.path} was built for batches of {known}, asked for {batch}; name it in engine.batch, and build again"
            )
        return super().signature(batch, sample)

    def facts(self) -> dict[str, Fact]:
        """What `inspect` shows; of what the engine inspector said, the summary alone. Raises ArtifactError as `require_whole`."""
        self.require_whole()
        left_out = ("schema", "engine", "engine_sha256", "size_bytes", "inspector")
        record = {key: value for key, value in self.record.items() if key not in left_out}
        return {**super().facts(), "precision": str(self.precision), **record}
