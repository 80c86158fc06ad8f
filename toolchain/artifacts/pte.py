"""ExecuTorch's format: one .pte file, whose weights the delegate has packed; what is in it, engine.json beside it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from toolchain.artifacts.engine import RECORD, Engine
from toolchain.artifacts.inputs import Port, Signature
from toolchain.errors import ArtifactError, RecipeError
from toolchain.model import BATCH, Preprocess
from toolchain.outputs import Output

MAGIC = b"ET12"
"""Bytes 4 to 8 of every file of this format."""


@dataclass(frozen=True)
class Pte(Engine):
    """A .pte file, read without ExecuTorch."""

    name: ClassVar[str] = "pte"
    word: ClassVar[str] = ".pte file"
    patterns: ClassVar[tuple[str, ...]] = ("*.pte",)

    def _told(self, key: str) -> Any:
        """What engine.json says under a key; raises ArtifactError for a file that is none of this format, or has no record."""
        with self.path.open("rb") as stream:
            if stream.read(8)[4:] != MAGIC:
                raise ArtifactError(f"{self.path} is no .pte file: it does not have the mark of one")
        if key not in self.record:
            raise ArtifactError(
                f"{self.path}: no {RECORD} beside it tells its {key}; build it again with `slimvit engine`"
            )
        return self.record[key]

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches that it takes, one method each."""
        return tuple(self._told("batches"))

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; the batch is open where it has methods for several."""
        return tuple(
            Port(
                each["name"],
                each["type"],
                (BATCH if each["shape"][0] is None else each["shape"][0], *each["shape"][1:]),
            )
            for each in self._told("inputs")
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs, in their order; their shapes are not recorded."""
        return tuple(Port(name, "", None) for name in self._told("outputs"))

    @property
    def preprocess(self) -> Preprocess | None:
        """What its ONNX file said of how images become its input."""
        told = self.record.get("preprocess")
        return None if told is None else Preprocess.from_dict(told)

    @property
    def output(self) -> Output | None:
        """What its ONNX file said that its outputs are."""
        return next((kind for kind in get_args(Output) if kind == self.record.get("output")), None)

    @property
    def own_pixels(self) -> bool:
        """Whether it takes slimvit's pixels."""
        return bool(self.record.get("own_pixels"))

    def signature(self, batch: int, sample: tuple[int, ...] | None = None) -> Signature:
        """Its inputs as they are fed; raises RecipeError for a batch that it has no method for, and as its base does."""
        if batch not in self.batches:
            known = ", ".join(map(str, self.batches))
            raise RecipeError(
                f"{self.path} was built for batches of {known}, asked for {batch}; name it in engine.batch, and build again"
            )
        return super().signature(batch, sample)
