"""A file of a repository before it is written, and the digests by which a hub knows it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict

CHUNK = 1 << 20


class Digests(BaseModel):
    """What tells a file from others: a hub knows a large one by its sha256, and a small one by git's sha1.

    Attributes:
        bytes: its size.
        sha256: of its bytes; "" if unknown.
        git: the id of its git blob; "" if unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str = ""
    git: str = ""

    def same(self, other: Digests) -> bool:
        """Whether both are of the same bytes, by every digest that both have, and by one at least."""
        pairs = [(self.sha256, other.sha256), (self.git, other.git)]
        known = [a == b for a, b in pairs if a and b]
        return self.bytes == other.bytes and bool(known) and all(known)


@dataclass(frozen=True)
class Content:
    """What a file is to hold: bytes, or those of a file of this machine."""

    data: bytes | Path

    @cached_property
    def digests(self) -> Digests:
        """The size and digests of the content."""
        size = len(self.data) if isinstance(self.data, bytes) else self.data.stat().st_size
        plain, blob = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        if isinstance(self.data, bytes):
            plain.update(self.data)
            blob.update(self.data)
        else:
            with self.data.open("rb") as file:
                while chunk := file.read(CHUNK):
                    plain.update(chunk)
                    blob.update(chunk)
        return Digests(bytes=size, sha256=plain.hexdigest(), git=blob.hexdigest())

    @staticmethod
    def of_text(text: str) -> Content:
        """A text file."""
        return Content(text.encode())
