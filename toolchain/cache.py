"""A run's folder: what is done is recorded by content, so a run that was killed goes on where it stopped.

A stage's record holds the digest of everything it depended on and of everything it wrote. It counts only if both still
hold; a half-written or altered file makes its stage run again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifact import read_json, sha256, write_json
from toolchain.errors import ArtifactError, StorageError

PRIVATE = ".slimvit"


@dataclass(frozen=True)
class Done:
    """A finished stage: what it found out, how long it took, and whether that was in an earlier run."""

    facts: dict[str, Any]
    seconds: float
    reused: bool


class Workspace:
    """The folder of one run."""

    def __init__(self, root: Path, *, resume: bool = True) -> None:
        self.root, self.resume = root, resume
        self.private = root / PRIVATE

    @contextlib.contextmanager
    def open(self) -> Iterator[Workspace]:
        """This workspace, writable and held against other runs until the block ends.

        Raises:
            StorageError: the folder cannot be written, or another run holds it.
        """
        try:
            self.private.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.private), (self.private / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise StorageError(
                        f"another run is writing to {self.root}; wait for it or choose another --out"
                    ) from None
                self._sweep()
                yield self
        except OSError as error:
            raise StorageError(f"cannot write to {self.root}: {error.strerror or error}") from error

    def _sweep(self) -> None:
        """Removes what a killed run left half-written."""
        for path in self.root.rglob(".*.partial"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def scratch(self, stage: str) -> Path:
        """Where a stage keeps what it needs to resume itself; removed when the stage is done."""
        return self.private / f"{stage}.safetensors"

    def step(self, stage: str, key: str, work: Callable[[], tuple[Iterable[Path], dict[str, Any]]]) -> Done:
        """What a stage found out: from its record if that still holds, else by doing the work.

        Args:
            stage: name of the record.
            key: digest of everything that the outcome depends on.
            work: returns (files and folders written below the root, facts as JSON values).
        """
        record = self.private / f"{stage}.json"
        if self.resume and (known := self._valid(record, key)) is not None:
            return Done(known["facts"], known["seconds"], reused=True)
        record.unlink(missing_ok=True)
        start = time.monotonic()
        paths, facts = work()
        seconds = time.monotonic() - start
        outputs = {str(file.relative_to(self.root)): sha256(file) for path in paths for file in files_below(path)}
        write_json(record, {"key": key, "seconds": seconds, "facts": facts, "outputs": outputs})
        self.scratch(stage).unlink(missing_ok=True)
        return Done(facts, seconds, reused=False)

    def _valid(self, record: Path, key: str) -> dict[str, Any] | None:
        if not record.exists():
            return None
        try:
            known = read_json(record)
            if known["key"] != key:
                return None
            if any(sha256(self.root / name) != digest for name, digest in known["outputs"].items()):
                return None
        except (ArtifactError, StorageError, KeyError, TypeError):
            return None
        return dict(known)


def files_below(path: Path) -> list[Path]:
    """A file itself, or every file of a folder, sorted."""
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def user_cache() -> Path:
    """The folder that recipes share: SLIMVIT_CACHE_DIR, else slimvit below the user's cache folder."""
    if custom := os.environ.get("SLIMVIT_CACHE_DIR"):
        return Path(custom)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimvit"
