"""Files inside a Qt resource collection (`.rcc`), by their path; what is compressed there is left out.

A collection is a header of big-endian numbers, a table of nodes (22 bytes each, 14 before version 2), names in UTF-16,
and data, each piece behind its length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from toolchain.errors import DataError

FOLDER, COMPRESSED = 2, 1 | 4
"""Bits of a node's flags: it is a folder; its data are zlib's or zstd's."""


class ResourceFile:
    """A collection that was read; raises DataError where a path is no collection."""

    def __init__(self, path: Path) -> None:
        self._bytes = path.read_bytes()
        if self._bytes[:4] != b"qres":
            raise DataError(
                f"{path} is no Qt resource collection: it begins with {self._bytes[:4]!r}, not with b'qres'"
            )
        version, self._tree, self._data, self._names = struct.unpack_from(">4i", self._bytes, 4)
        self._node = 22 if version >= 2 else 14
        self._at = dict(self._walk(0, ""))

    def __iter__(self) -> Iterator[str]:
        """The paths, sorted."""
        return iter(sorted(self._at))

    def read(self, path: str) -> bytes:
        """The bytes of a file; raises DataError if it is not there."""
        if path not in self._at:
            raise DataError(f"the resource collection has no {path!r} that is not compressed")
        start = self._at[path]
        (length,) = struct.unpack_from(">I", self._bytes, start)
        return self._bytes[start + 4 : start + 4 + length]

    def _walk(self, number: int, path: str) -> Iterator[tuple[str, int]]:
        """(path, where its length stands) of every file below a node."""
        name, flags, count, first = struct.unpack_from(">IHII", self._bytes, self._tree + number * self._node)
        path = f"{path}/{self._name(name)}" if number else path
        if flags & FOLDER:
            for child in range(first, first + count):
                yield from self._walk(child, path)
        elif not flags & COMPRESSED:
            yield path.lstrip("/"), self._data + first  # where a folder has its first child, a file has its data

    def _name(self, at: int) -> str:
        at += self._names
        (length,) = struct.unpack_from(">H", self._bytes, at)
        return self._bytes[at + 6 : at + 6 + 2 * length].decode("utf-16-be")
