"""A run's folder: finished stages are recorded by content, so that a killed run resumes where it stopped.

A stage's record holds the digest of everything it depended on and of everything it wrote. It counts only if both still
hold; a half-written or altered file makes its stage run again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import PIL
import timm
import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ValidationError

from toolchain.errors import ArtifactError, FolderBusy, StorageError, fault_words
from toolchain.files import digest_of, exclusive, files_below, read_json, sha256, write_json
from toolchain.model import Made
from toolchain.parity import Rung
from toolchain.pipeline.tools import Tools
from toolchain.records import Record
from toolchain.report.absent import PRIVATE

log = logging.getLogger(__name__)
OUTPUTS = (
    "allocation.json",
    "damage.json",
    "latency.",
    "plan.json",
    "recipe.toml",
    "dense",
    "masked",
    "finetuned",
    "deploy",
    "onnx",
    "engines",
    "bench",
    "report.json",
    "report.md",
    "report.html",
    "manifest.json",
)


Facts = TypeVar("Facts", bound=BaseModel)
Written = Sequence[Path]
"""Files and folders that a stage of a run wrote."""


class Nothing(Record):
    """Facts of a stage that reports none."""


@dataclass(frozen=True)
class Done(Generic[Facts]):
    """A finished stage: what it found out and wrote, how long it took, and whether that was in an earlier run."""

    facts: Facts
    rungs: tuple[Rung, ...]
    seconds: float
    reused: bool
    outputs: tuple[str, ...] = ()


class _Head(BaseModel):
    """What every record says, whatever its facts are; `tools` are None in one of an earlier version."""

    key: str
    tools: Tools | None = None
    outputs: dict[str, str]


class _Recorded(Record, Generic[Facts]):
    """The content of a record."""

    key: str
    tools: Tools | None = None
    seconds: float
    facts: Facts
    rungs: tuple[Rung, ...]
    outputs: dict[str, str]


def step_key(name: str, tool: str, inputs: Sequence[Any]) -> str:
    """Digest of everything that the outcome of a stage depends on: its inputs, and what carries it out."""
    versions = [torch.__version__, timm.__version__, PIL.__version__]
    return digest_of(name, [tool, *versions, torch.get_num_threads()], inputs)


class Workspace:
    """The folder of one run.

    Attributes:
        root: the folder.
        resume: False does every stage anew.
        others: folders of other runs; a stage that one of them finished from the same inputs is taken over from there.
    """

    def __init__(self, root: Path, *, resume: bool = True, others: Sequence[Path] = ()) -> None:
        self.root, self.resume = root, resume
        self.others = [Workspace(other) for other in others if other != root]
        self.private = root / PRIVATE
        self._told = set[str]()

    def check(self) -> None:
        """Raises StorageError if the folder plainly cannot be written, FolderBusy if another run is at it; creates nothing."""
        there = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not there.is_dir():
            raise StorageError(f"cannot write to {self.root}: {there} is not a folder; choose another one")
        if not os.access(there, os.W_OK | os.X_OK):
            raise StorageError(
                f"cannot write to {self.root}: {there} is read-only or belongs to another user; choose another folder"
            )
        if self._lock.exists():
            with self._held():
                pass

    @contextlib.contextmanager
    def open(self) -> Iterator[Workspace]:
        """This workspace, writable and locked against other runs until the block ends.

        Raises:
            StorageError: the folder cannot be written, another run holds it, or reading or writing failed in the block.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.private.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._held())
            except OSError as error:
                raise StorageError(f"cannot write to {self.root}: {fault_words(error)}") from error
            try:
                self._sweep()
                yield self
            except OSError as error:
                raise StorageError(f"{error.filename or self.root}: {fault_words(error)}") from error

    @property
    def _lock(self) -> Path:
        return self.private / "lock"

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Raises FolderBusy if another run is writing here."""
        try:
            lock = FileLock(self._lock)
            lock.acquire(blocking=False)
        except Timeout:
            raise FolderBusy(f"another run is writing to {self.root}; wait for it or choose another --out") from None
        try:
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Removes what a killed run left half-written; looks only where a run writes."""
        partials = [path for name in OUTPUTS for path in self.root.glob(f".{name}*.partial")]
        folders = [self.private, *(self.root / name for name in OUTPUTS if (self.root / name).is_dir())]
        for path in (*partials, *(path for folder in folders for path in folder.rglob(".*.partial"))):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def forget_all_but(self, stages: Collection[str]) -> None:
        """Removes what other stages of an earlier recipe wrote here, unless it was altered since, and their records."""
        used = {name for stage in stages for name in self._outputs(self.private / f"{stage}.json")}
        for record in self.private.glob("*.json"):
            if record.stem in stages:
                continue
            for name, digest in self._outputs(record).items():
                path = self.root / name
                if name not in used and path.is_file() and sha256(path) == digest:
                    path.unlink()
                    with contextlib.suppress(OSError):  # a folder that still holds something stays
                        path.parent.rmdir()
            record.unlink()

    @staticmethod
    def _outputs(record: Path) -> dict[str, str]:
        try:
            return dict(read_json(record)["outputs"])
        except (ArtifactError, StorageError, KeyError, TypeError, ValueError):
            return {}

    def has(self, prefix: str) -> bool:
        """Whether a stage whose name begins so is recorded, and may be reused."""
        return self.resume and any(record.name.startswith(prefix) for record in self.private.glob("*.json"))

    def scratch(self, stage: str) -> Path:
        """Where a stage keeps what it needs to resume itself; removed when the stage is done."""
        return self.private / f"{stage}.safetensors"

    def step(
        self,
        stage: str,
        key: str,
        kind: type[Facts],
        work: Callable[[], Made[Written, Facts]],
        *,
        settled: Callable[[Facts], bool] = lambda _: True,
        tools: Tools | None = None,
    ) -> Done[Facts]:
        """What a stage found out: from its record if that still holds, else by doing the work, with a warning why.

        Args:
            stage: name of the record.
            key: digest of everything that the outcome depends on.
            kind: of the facts.
            work: returns what was written below the root, the facts, and the rungs.
            settled: whether recorded facts answer the question; if not, the work is done again.
            tools: what does the work, and is part of the key; None where a record need not tell.
        """
        known = self.recorded(stage, key, kind)
        if known is not None and settled(known.facts):
            return known
        if not self.resume:  # else the record holds, for what it speaks of, until the work is done
            (self.private / f"{stage}.json").unlink(missing_ok=True)
            self.scratch(stage).unlink(missing_ok=True)
        elif known is None and tools is not None:
            self._tell(stage, key, tools)
        with self._alone(stage, key):
            # another run may have done it while this one waited
            taken = self.recorded(stage, key, kind) if self.others else None
            if taken is not None and settled(taken.facts):
                return taken
            return self._done(stage, key, tools, kind, work)

    def _tell(self, stage: str, key: str, tools: Tools) -> None:
        """Warns, once for each reason, that a stage is done again although it is recorded."""
        record = self.private / f"{stage}.json"
        try:
            known = _Head.model_validate_json(record.read_bytes())
        except (OSError, ValidationError):  # there is none, or none that can be read
            return
        if known.tools is None:
            return
        if other := tools.other_than(known.tools):
            reason = f"{other}. To keep what is there, interrupt this run and go back to that."
            if reason not in self._told:
                log.warning("%s is made anew, and so is all that follows: %s", stage, reason)
            self._told.add(reason)
        elif known.key != key:
            log.info("%s is made anew: the recipe, the data, or what comes before it changed", stage)
        elif altered := [name for name, digest in known.outputs.items() if self._digest(name) != digest]:
            log.warning("%s is made anew: %s is gone or is not as it was written", stage, altered[0])

    def _digest(self, name: str) -> str:
        """sha256 of a file of the run; "" if it cannot be read."""
        try:
            return sha256(self.root / name)
        except (OSError, StorageError):
            return ""

    def _done(
        self,
        stage: str,
        key: str,
        tools: Tools | None,
        kind: type[Facts],
        work: Callable[[], Made[Written, Facts]],
    ) -> Done[Facts]:
        """What a stage found out, by doing its work, and recorded."""
        start = time.monotonic()
        outcome = work()
        seconds = time.monotonic() - start
        outputs = {
            str(file.relative_to(self.root)): sha256(file) for path in outcome.artifact for file in files_below(path)
        }
        content = _Recorded[kind](  # type: ignore[valid-type]
            key=key, tools=tools, seconds=seconds, facts=outcome.facts, rungs=outcome.rungs, outputs=outputs
        )
        write_json(self.private / f"{stage}.json", content.model_dump(mode="json", by_alias=True))
        self.scratch(stage).unlink(missing_ok=True)
        return Done(outcome.facts, outcome.rungs, seconds, reused=False, outputs=tuple(outputs))

    def recorded(self, stage: str, key: str, kind: type[Facts]) -> Done[Facts] | None:
        """What is recorded of a stage, if that still holds and may be reused."""
        record = self.private / f"{stage}.json"
        if self.resume and not self._holds(record, key):
            self._take_over(stage, key)
        if not (self.resume and record.exists()):
            return None
        try:
            known: _Recorded[Facts] = _Recorded[kind].model_validate_json(record.read_bytes())  # type: ignore[valid-type]
            if known.key != key or any(sha256(self.root / name) != digest for name, digest in known.outputs.items()):
                return None
        except (StorageError, OSError, ValidationError):
            return None  # a damaged record is no record
        return Done(known.facts, known.rungs, known.seconds, reused=True, outputs=tuple(known.outputs))

    @staticmethod
    def _holds(record: Path, key: str) -> bool:
        try:
            return bool(read_json(record)["key"] == key)
        except (ArtifactError, StorageError, KeyError, TypeError):
            return False

    def _alone(self, stage: str, key: str) -> contextlib.AbstractContextManager[object]:
        """Held against the same stage of other runs, which then take it over instead of doing it as well."""
        if not self.others:
            return contextlib.nullcontext()
        wait = partial(log.warning, "another process is at the stage %s; waiting for it", stage)
        return exclusive(self.root.parent / PRIVATE / f"{stage}-{key[:16]}", wait)

    def _take_over(self, stage: str, key: str) -> None:
        """Puts here what another run wrote in a stage of the same key, as links where the file system has them."""
        for other in self.others:
            record = other.private / f"{stage}.json"
            if not self._holds(record, key):
                continue
            # A folder without its own record, a JSON file, would be nobody's: no stage replaces it.
            names = sorted(self._outputs(record), key=lambda name: (not name.endswith(".json"), name))
            there = list[Path]()
            try:
                for name in names:
                    there.append(self.root / name)
                    _put(other.root / name, self.root / name)
                _put(record, self.private / record.name)
            except OSError:  # the other run went on: what is no longer there is not taken over
                for path in there:
                    path.unlink(missing_ok=True)
            else:
                return


def _put(source: Path, to: Path) -> None:
    """A file in place of what is there, at once: the same file where it can be linked, else a copy."""
    to.parent.mkdir(parents=True, exist_ok=True)
    new = to.with_name(f".{to.name}.partial")
    new.unlink(missing_ok=True)
    try:
        os.link(source, new)
    except OSError:
        shutil.copyfile(source, new)
    new.replace(to)
