"""ExecuTorch's format: one .pte file, with weights packed by the delegate, and its inputs and outputs described as JSON."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from toolchain.artifacts.base import Reading
from toolchain.artifacts.engine import Engine
from toolchain.artifacts.inputs import Port, Signature
from toolchain.errors import ArtifactError, RecipeError
from toolchain.model import BATCH, Preprocess
from toolchain.on_device.runner import PTE_FORM
from toolchain.outputs import Output, output_named

FIRST = json.dumps(PTE_FORM).encode()[:-1]
"""First bytes of the JSON with which a file describes itself."""
MAGIC = b"ET12"
"""Bytes 4 to 8 of every file of this format."""
HEADER = struct.Struct("<8x4sIQQQ")
"""How a file begins: the mark of a header, its length, the bytes of the program, and where segments begin and how long they are."""
MARK = b"eh00"


@dataclass(frozen=True)
class Pte(Engine):
    """A .pte file, read without ExecuTorch."""

    name: ClassVar[str] = "pte"
    word: ClassVar[str] = ".pte file"
    patterns: ClassVar[tuple[str, ...]] = ("*.pte",)

    @cached_property
    def told(self) -> dict[str, Any]:
        """Its own description; raises ArtifactError for a file of another format, or one that slimvit did not write."""
        content = self.path.read_bytes()
        if content[4:8] != MAGIC:
            raise ArtifactError(f"{self.path} is no .pte file: it does not have the mark of one")
        start = content.find(FIRST)
        if start < 0:
            raise ArtifactError(f"{self.path} does not say what it takes and gives: slimvit did not write it")
        length = int.from_bytes(content[start - 4 : start], "little")  # as flatbuffers store a string
        try:
            told = json.loads(content[start : start + length])
        except ValueError as error:
            raise ArtifactError(f"{self.path} is damaged where it says what it takes and gives: {error}") from None
        assert isinstance(told, dict)
        return told

    def require_whole(self) -> None:
        """Raises ArtifactError where it ends before the program or the weights that its header tells of, and as its base does."""
        with self.path.open("rb") as file:
            begins = file.read(HEADER.size)
        if len(begins) == HEADER.size:
            mark, length, program, first, segments = HEADER.unpack(begins)
            end = max(program, first + segments if length >= HEADER.size - 8 else 0)
            if mark == MARK and self.size_bytes < end:
                raise ArtifactError(
                    f"{self.path} has {self.size_bytes:,} bytes, and its header tells of {end:,}: it is truncated"
                )
        super().require_whole()

    @property
    def precision(self) -> Reading:
        """The precision of its coarsest matrix product; without engine.json, the one that the file declares."""
        return super().precision if self.record else Reading(str(self.told["precision"]))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches that it takes, one method each."""
        return tuple(self.told["batches"])

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; the batch is open where it has methods for several."""
        return tuple(
            Port(
                each["name"],
                each["type"],
                (BATCH if each["shape"][0] is None else each["shape"][0], *each["shape"][1:]),
            )
            for each in self.told["inputs"]
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs, in their order; their shapes are not recorded."""
        return tuple(Port(name, "", None) for name in self.told["outputs"])

    @property
    def preprocess(self) -> Preprocess | None:
        """The preprocessing that its ONNX file declared."""
        told = self.told["preprocess"]
        return None if told is None else Preprocess.from_dict(told)

    @property
    def output(self) -> Output | None:
        """The kind of output that its ONNX file declared."""
        return output_named(self.told["output"])

    @property
    def own_pixels(self) -> bool:
        """Whether it takes slimvit's pixels."""
        return bool(self.told["own_pixels"])

    def signature(self, batch: int, sample: tuple[int, ...] | None = None) -> Signature:
        """Its inputs as they are fed; raises RecipeError for a batch that it has no method for, and as its base does."""
        if batch not in self.batches:
            known = ", ".join(map(str, self.batches))
            raise RecipeError(
                f"{self.path} was built for batches of {known}, asked for {batch}; name it in engine.batch, and build again"
            )
        return super().signature(batch, sample)
