"""Temporary places beside what is written, and errors that name what was asked for instead."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.errors import StorageError, fault_words

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How systems say that there is no room."""


@contextmanager
def standing_for(path: Path, temporary: Path) -> Iterator[None]:
    """A block that writes to a temporary place; its StorageErrors name the path that the user knows.

    Args:
        path: what the temporary place stands for.
        temporary: a file or a folder.

    Raises:
        StorageError: something cannot be written there.
    """
    try:
        yield
    except StorageError as error:
        why = str(error).partition(str(temporary))[2].partition(": ")[2]
        if not why:
            raise
        raise StorageError(f"cannot write {path}: {why}") from error
    except OSError as error:
        if error.errno in FULL or str(error.filename or "").startswith(str(temporary)):
            raise StorageError(f"cannot write {path}: {fault_words(error)}") from error
        raise


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder beside a file that is to be written, gone after the block; raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {fault_words(error)}") from error
    with folder as name, standing_for(path, Path(name)):
        yield Path(name)


@contextmanager
def exchange() -> Iterator[Path]:
    """A folder for files that a quantiser reads and writes, gone after the block.

    Raises:
        StorageError: there is no room for them.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="slimvit-quantise-") as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageError(
            f"{tempfile.gettempdir()} has no room for a copy of the graph: make some, or set TMPDIR to a folder that has more"
        ) from error
