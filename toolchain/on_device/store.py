"""What a device has, and files kept there by digest. Standard library only, Python 3.8, imports nothing of the project.

It is sent through ssh's standard input and run from there; nothing of it stays. Two modes, each with one line of JSON on
standard input: `look ROOT` with {"files": {path: sha256}, "modules": [name]} answers what is there and which files are
missing or altered; `receive ROOT` with {"files": [{path, sha256, size}]}, followed by their bytes, stores them. The
answer is the last line of standard output. Exit codes: 0 good, 4 bytes that are not what their digest says, 74 storage.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FILES, EXIT_STORAGE = 4, 74
PARTIAL = ".partial"
DAY_S = 86400
CHUNK = 1 << 20


class Sent(TypedDict):
    """A file on its way: its name below the root, the digest that it must have, its bytes."""

    path: str
    sha256: str
    size: int


class AlteredError(Exception):
    """Bytes that arrived are not the ones that were announced."""


def look(root: Path, files: dict[str, str], modules: Sequence[str]) -> dict[str, object]:
    """The interpreter, each module's version or why it cannot be imported, and which of `files` have to be sent."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime loads
    found: dict[str, dict[str, str]] = {}
    for name in modules:
        try:
            found[name] = {"version": str(getattr(importlib.import_module(name), "__version__", "?"))}
        except Exception as error:  # noqa: BLE001 - a broken library fails in its own ways
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return {
        "root": str(root),
        "python": platform.python_version(),
        "executable": sys.executable,
        "modules": found,
        "missing": [name for name, digest in files.items() if file_sha256(safe(root, name)) != digest],
    }


def receive(root: Path, files: Sequence[Sent], stream: BinaryIO) -> dict[str, object]:
    """The names of the files that were read from `stream`, checked and put in place, each atomically.

    Raises:
        AlteredError: a file's bytes do not have its digest, or the stream ends early.
        OSError: a file cannot be written.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in root.rglob("*" + PARTIAL):  # of a transfer that was cut off; a younger one may be under way
        if time.time() - left.stat().st_mtime > DAY_S:
            left.unlink()
    needed, free = sum(file["size"] for file in files), shutil.disk_usage(str(root)).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"no space left: {needed} bytes are needed, {free} are free", str(root))
    for file in files:
        target = safe(root, file["path"])
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=PARTIAL, dir=str(target.parent))
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as out:
                _copy(stream, out, file)
                out.flush()
                os.fsync(out.fileno())
            partial.replace(target)
        finally:
            if partial.exists():
                partial.unlink()
    return {"stored": [file["path"] for file in files]}


def _copy(stream: BinaryIO, out: BinaryIO, file: Sent) -> None:
    digest, left = hashlib.sha256(), file["size"]
    while left:
        chunk = stream.read(min(CHUNK, left))
        if not chunk:
            raise AlteredError(f"{file['path']}: the transfer ended {left} bytes early")
        digest.update(chunk)
        out.write(chunk)
        left -= len(chunk)
    if digest.hexdigest() != file["sha256"]:
        raise AlteredError(
            f"{file['path']} arrived altered: its sha256 is {digest.hexdigest()}, expected {file['sha256']}"
        )


def safe(root: Path, name: str) -> Path:
    """`name` below `root`; raises ValueError if it would lie elsewhere."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"{name!r} is no name below the folder")
    return root.joinpath(*parts)


def file_sha256(path: Path) -> str:
    """The hex digest of a file, "" if there is none."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(CHUNK), b""):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


def main(argv: Sequence[str]) -> int:
    """The exit code of one request."""
    mode, root = argv[0], Path(argv[1]).expanduser().absolute()
    request = json.loads(sys.stdin.buffer.readline().decode("utf-8"))
    try:
        if mode == "look":
            answer = look(root, request["files"], request["modules"])
        else:
            answer = receive(root, request["files"], sys.stdin.buffer)
    except AlteredError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FILES
    except OSError as error:
        sys.stderr.write(f"cannot write {error.filename or root}: {error.strerror or error}\n")
        return EXIT_STORAGE
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
