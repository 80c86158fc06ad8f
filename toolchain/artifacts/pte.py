"""ExecuTorch's format: one .pte file, with weights packed by the delegate, and its inputs and outputs described as JSON."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from toolchain.artifacts.base import Reading, require_bytes
from toolchain.artifacts.engine import Engine
from toolchain.artifacts.inputs import Port
from toolchain.errors import ArtifactError
from toolchain.files import reading
from toolchain.model import BATCH
from toolchain.on_device.runner import PTE_FORM

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
    def declared(self) -> dict[str, Any]:
        """Its own description; raises ArtifactError for a file of another format, or one that slimvit did not write."""
        with reading(self.path):
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
        with reading(self.path), self.path.open("rb") as file:
            begins = file.read(HEADER.size)
        if len(begins) == HEADER.size:
            mark, length, program, first, segments = HEADER.unpack(begins)
            end = max(program, first + segments if length >= HEADER.size - 8 else 0)
            if mark == MARK:
                require_bytes(self.path, end, f"its header tells of {end:,}")
        super().require_whole()

    @property
    def precision(self) -> Reading:
        """The precision of its coarsest matrix product; without engine.json, the one that the file declares."""
        return super().precision if self.record else Reading(str(self.declared["precision"]))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches that it takes, one method each."""
        return tuple(self.declared["batches"])

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; the batch is open where it has methods for several."""
        return tuple(
            Port(each["name"], each["type"], (each["shape"][0] or BATCH, *each["shape"][1:]))
            for each in self.declared["inputs"]
        )

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs, in their order; their shapes are not recorded."""
        return tuple(Port(name, "", None) for name in self.declared["outputs"])

    @property
    def own_pixels(self) -> bool:
        """Whether it takes slimvit's pixels."""
        return bool(self.declared["own_pixels"])
