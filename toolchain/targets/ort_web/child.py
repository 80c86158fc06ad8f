"""A Node process that holds one ONNX file open and answers over its standard streams; `serve.mjs` is what it runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ValidationError

from toolchain.errors import ArtifactError, RecipeError, TargetUnavailable
from toolchain.records import place_and_fault
from toolchain.targets.base import Arrays, Feeds
from toolchain.targets.child import ChildRunner

SCRIPT = Path(__file__).with_name("serve.mjs")
LENGTH = np.dtype("<u4")
"""Of a message's header: it comes first."""
NO_REASON = re.compile(r"\s|Node\.js v|\W*$")
"""How lines of Node's begin that say where, and not what."""


class _Array(BaseModel):
    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int


class _Answer(BaseModel):
    """The header of what the child sends."""

    error: str = ""
    threads: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[_Array, ...] = ()
    times_ns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Installed:
    """Node, and a folder in which onnxruntime-web is installed.

    Attributes:
        node: the program.
        folder: that holds node_modules.
        versions: "onnxruntime-web" and "node" → version.
    """

    node: str
    folder: Path
    versions: Mapping[str, str]


class NodeRunner(ChildRunner):
    """An ONNX file in ONNX Runtime Web: its wasm with SIMD, all graph optimisations, sequential, `threads` threads.

    Times are taken in the child around each call, so they hold what a page waits for and no message between processes.
    """

    def __init__(self, path: Path, threads: int, installed: Installed, *, target: str) -> None:
        self.path, self.threads = path, threads
        self.versions = dict(installed.versions)
        self._installed, self.target = installed, target
        self._inputs: tuple[str, ...] = ()

    def _command(self) -> tuple[list[str], None]:
        """Raises TargetUnavailable for more threads than there are cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.threads > cores:
            raise TargetUnavailable(
                self.target, f"{self.threads} threads are more than the {cores} cores that there are"
            )
        command = [self._installed.node, "--expose-gc", str(SCRIPT), str(self._installed.folder), str(self.path)]
        return [*command, str(self.threads)], None

    def _opened(self) -> None:
        """Raises TargetUnavailable if the child runs with other threads than asked for."""
        opened, _ = self._receive()
        if opened.threads != self.threads:
            reason = f"ONNX Runtime Web was asked for {self.threads} threads and runs with {opened.threads}"
            raise TargetUnavailable(self.target, reason)
        self._inputs = opened.inputs

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call.

        Raises:
            RecipeError: an input is missing.
            ArtifactError: the file cannot be run on these feeds, or the child died; in its own words.
        """
        answer, raw = self._ask([feeds])
        arrays: Arrays = {}
        for each in answer.outputs:
            arrays[each.name] = np.frombuffer(raw[: each.bytes], np.dtype(each.type)).reshape(each.shape).copy()
            raw = raw[each.bytes :]
        return arrays

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds by the child's clock, rotating through `feeds`; raises as `infer`."""
        answer, _ = self._ask(feeds, samples)
        return list(answer.times_ns)

    def _ask(self, feeds: Sequence[Feeds], samples: int | None = None) -> tuple[_Answer, bytes]:
        """The answer to one request."""
        blobs: list[bytes] = []
        listed, offset = [], 0
        for feed in feeds:
            if missing := sorted(set(self._inputs) - set(feed)):
                raise RecipeError(f"{self.path}: inputs {missing} are not fed, got {sorted(feed)}")
            arrays = []
            for name in self._inputs:
                array = np.ascontiguousarray(feed[name])
                blobs.append(array.tobytes())
                count = len(blobs[-1])
                arrays.append(
                    {"name": name, "type": array.dtype.name, "shape": array.shape, "offset": offset, "bytes": count}
                )
                offset += count
            listed.append(arrays)
        header = {"feeds": listed, "bytes": offset, **({} if samples is None else {"samples": samples})}
        text = json.dumps(header).encode()
        process = self._running()
        try:
            for part in (np.array(len(text), LENGTH).tobytes(), text, *blobs):
                process.stdin.write(part)
            process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        return self._receive()

    def _receive(self) -> tuple[_Answer, bytes]:
        """The child's next message; raises ArtifactError for one that tells an error, and where the child died."""
        text = self._read(int(np.frombuffer(self._read(LENGTH.itemsize), LENGTH)[0]))
        try:
            answer = _Answer.model_validate_json(text)
        except ValidationError as error:
            raise ArtifactError(f"{self.path}: Node sent what is no answer: {place_and_fault(error)[1]}") from None
        if answer.error:
            version = self.versions["onnxruntime-web"]
            raise ArtifactError(f"ONNX Runtime Web {version} cannot run {self.path}: {answer.error}")
        return answer, self._read(sum(each.bytes for each in answer.outputs))

    def _read(self, count: int) -> bytes:
        got: bytes = self._running().stdout.read(count)
        if len(got) < count:
            raise self._died()
        return got

    def _died(self) -> ArtifactError:
        """What to raise where the child is gone: the last of the lines that it printed which says something."""
        code = self._code()
        said = [line for line in self._printed() if not NO_REASON.match(line)]
        return ArtifactError(
            f"{self.path}: Node ended in ONNX Runtime Web ({'no exit code' if code is None else code}): "
            f"{said[-1] if said else 'it said nothing'}"
        )
