"""File helpers: atomic writes, JSON, digests, locks between processes, and the user's cache folder."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import gzip
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from toolchain.errors import ArtifactError, StorageError, fault_words

GZIP = b"\x1f\x8b"
"""First bytes of a gzipped file."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """A block that reads a file; what the system refuses in it is raised as a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot read {path}: {fault_words(error)}") from error


def sha256(path: Path) -> str:
    """The hex digest of a file's bytes; raises StorageError if it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(*parts: Any) -> str:
    """sha256 of the canonical JSON of the parts: the key of a cache entry."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_stream(path: Path) -> bool:
    """Whether a path is that of a device or a pipe, or of what a link in /dev leads to."""
    return path.exists() and (Path("/dev") in path.absolute().parents or not (path.is_file() or path.is_dir()))


def followed(path: Path) -> Path:
    """What a link leads to, so that writing there keeps the link; any other path, and that of a stream, is itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() and not is_stream(path) else path


LONGEST = 200
"""Bytes of a file's name to which others can be added: a file system takes 255."""


def _beginning(name: str) -> str:
    """How the names begin of what lies for a while beside a file or folder of a name."""
    return f".{name}." if len(os.fsencode(name)) <= LONGEST else f".{digest_of(os.fsencode(name).hex())[:32]}."


def _new_file(folder: Path, name: str) -> Path:
    """An empty file for what will be called so, readable for whom the user's umask lets in."""
    path = folder / f"{_beginning(name)}{secrets.token_hex(8)}.partial"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well and is removed when it does not.

    A device or a pipe, such as /dev/null, is written into instead: nothing may take its place.

    Raises:
        StorageError: the folder is missing, read-only or full.
    """
    temporary: Path | None = None
    try:
        if is_stream(path):
            with tempfile.TemporaryDirectory(prefix="slimvit-") as folder:
                whole = Path(folder, "whole")
                yield whole
                with path.open("wb") as stream:
                    stream.write(whole.read_bytes())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_file(path.parent, path.name)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # a library may have put another file in its place
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {fault_words(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically; raises StorageError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # how Python keeps the bytes of a file's name that are no text
        start = text.rfind("\n", 0, error.start) + 1
        raise StorageError(
            f"cannot write {path}: {text[start : error.end]!r} is no UTF-8; rename the file or folder that is called so"
        ) from None
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; raises StorageError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The parsed JSON of a file, gzipped or not; raises StorageError if unreadable and ArtifactError if it is no JSON."""
    try:
        stored = path.read_bytes()
    except OSError as error:
        hint = f", seen from {Path.cwd()}" if isinstance(error, FileNotFoundError) else ""
        raise StorageError(f"cannot read {path}: {fault_words(error)}{hint}") from error
    try:
        text = gzip.decompress(stored) if stored.startswith(GZIP) else stored
        return json.loads(text.decode("utf-8"))
    except (ValueError, EOFError, OSError, zlib.error, RecursionError) as error:  # ValueError: of JSON, and of UTF-8
        raise ArtifactError(f"{path} is not JSON: {error}") from None


def check_replaceable(folder: Path, files: Sequence[str]) -> None:
    """Raises StorageError if a folder cannot be written, or if replacing it would delete what slimvit did not write.

    Args:
        folder: what is to be replaced; absent, empty, or an earlier outcome of the same kind.
        files: names and wildcards of such an outcome, its record first.
    """
    _check_place(folder, str(folder))
    try:
        there = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {fault_words(error)}") from error
    known = (*files, ".*.partial")  # the latter is what a killed process left
    foreign = [name for name in there if not any(fnmatch.fnmatchcase(name, each) for each in known)]
    if foreign or (there and files[0] not in there):
        why = f"holds {foreign[0]}, which is no part of what would take its place" if foreign else f"has no {files[0]}"
        raise StorageError(f"{folder} is not replaced: it {why}; choose another folder or empty this one")


def check_file_replaceable(path: Path, beginning: bytes, option: str = "--out") -> None:
    """Raises StorageError if a file cannot be written, or if writing it would replace what slimvit did not write.

    Args:
        path: the file; one that is there must be empty or begin as the new one will.
        beginning: the first bytes of the new one.
        option: what named it.
    """
    if is_stream(path):
        return
    try:
        if path.is_dir():
            raise StorageError(f"{option} {path} is a folder; name a file in it")
        if path.exists():
            with path.open("rb") as file:
                start = file.read(len(beginning))
            if start not in (b"", beginning):
                raise StorageError(
                    f"{option} {path} is not replaced: a file of another kind lies there; choose another name"
                )
    except OSError as error:
        raise StorageError(f"{option} {path} cannot be written: {fault_words(error)}") from error
    _check_place(path, f"{option} {path}")


def _check_place(path: Path, name: str) -> None:
    """Raises StorageError if nothing can be written at a path, by the nearest of the folders above it that is there."""
    try:
        there = next(each for each in path.absolute().parents if each.exists())
    except OSError as error:
        raise StorageError(f"{name} cannot be written: {fault_words(error)}") from error
    if not there.is_dir():
        raise StorageError(f"{name} cannot be written: {there} is a file; choose another name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(
            f"{name} cannot be written: {there} is read-only or belongs to another user; choose another folder"
        )


@contextlib.contextmanager
def atomic_folder(folder: Path, files: Sequence[str] | None = None) -> Iterator[Path]:
    """A temporary folder beside `folder` that replaces it, whole, when the block ends well.

    Each call has one of its own, so that two runs can fill the same entry of a shared cache.

    Args:
        folder: what is written.
        files: what may be in the folder that is replaced, as in `check_replaceable`; None for anything.

    Raises:
        StorageError: the parent is read-only or full, or the folder holds something else.
    """
    folder = followed(folder)
    if files is not None:
        check_replaceable(folder, files)
    holder: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=_beginning(folder.name), suffix=".partial", dir=folder.parent))
        new, old = holder / "new", holder / "old"
        new.mkdir()
        yield new
        for path in new.rglob("*"):
            if path.is_file():
                with path.open("rb") as written:
                    os.fsync(written.fileno())
        with contextlib.suppress(FileNotFoundError):
            folder.replace(old)
        try:
            new.replace(folder)
        except OSError:
            if old.exists() and not folder.exists():
                old.replace(folder)
            raise
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {fault_words(error)}") from error
    finally:
        if holder is not None:
            shutil.rmtree(holder, ignore_errors=True)


def files_below(path: Path) -> list[Path]:
    """A file itself, or every file of a folder, sorted; what links lead to is what would be copied with it.

    Raises:
        StorageError: a link leads nowhere, or to a folder that it lies in.
    """
    return sorted(_files_of(path, (path.resolve(),))) if path.is_dir() else [path]


def _files_of(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if (real := path.resolve()) in above:
                raise StorageError(f"{path} is a link to a folder that it lies in; remove it")
            yield from _files_of(path, (*above, real))
        elif path.is_file():
            yield path
        elif path.is_symlink():
            raise StorageError(
                f"{path} is a link to {path.readlink()}, which is not there; fetch that, or remove the link"
            )


def home() -> Path:
    """The user's own folder; raises StorageError if the system knows of none."""
    try:
        return Path.home()
    except RuntimeError:
        raise StorageError(
            "the system names no home folder for this user: set HOME to a folder that can be written"
        ) from None


def expanded(path: Path | str) -> Path:
    """A path with the home folder that a `~` at its beginning stands for; raises StorageError if the system knows of none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise StorageError(
            f"{path}: the system names no home folder for that user; write the path without ~, or ./{path} if it is called so"
        ) from None


def user_cache() -> Path:
    """The folder that recipes share: SLIMVIT_CACHE_DIR, else slimvit below the user's cache folder."""
    if custom := os.environ.get("SLIMVIT_CACHE_DIR"):
        return expanded(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "slimvit"


@contextlib.contextmanager
def exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """A block that one process at a time enters for `path`; the others wait, and the lock ends with its process.

    What a killed process left half-written beside `path` is removed.

    Args:
        path: what is held; it need not exist.
        waiting: called once if another process holds it.

    Raises:
        StorageError: the folder of `path` cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f"{_beginning(path.name)}lock"))
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except Timeout:
                waiting()
                stack.enter_context(lock.acquire())
        except OSError as error:
            raise StorageError(
                f"cannot write to the cache {path.parent}: {fault_words(error)}. SLIMVIT_CACHE_DIR names another folder"
            ) from error
        for partial in path.parent.glob(f"{glob.escape(_beginning(path.name))}*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        yield
