"""A Node process that holds one ONNX file open and answers over its standard streams; `serve.mjs` is what it runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.errors import ArtifactError, RecipeError, WorkloadRefused
from toolchain.on_device.runner import usable_cores, usable_words
from toolchain.targets.base import Arrays, Feeds
from toolchain.targets.child import ChildRunner
from toolchain.targets.wire import Array, receive, send

SCRIPT = Path(__file__).with_name("serve.mjs")
NO_REASON = re.compile(r"\s|Node\.js v|\W*$")
"""How lines of Node's begin that say where, and not what."""


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
        """Raises WorkloadRefused for more threads than there are cores."""
        if self.threads > (usable := usable_cores()):
            raise WorkloadRefused(self.target, f"{self.threads} threads are more than {usable_words(usable)}")
        command = [self._installed.node, "--expose-gc", str(SCRIPT), str(self._installed.folder), str(self.path)]
        return [*command, str(self.threads)], None

    def _opened(self) -> None:
        """Raises WorkloadRefused if the child runs with other threads than asked for."""
        opened, _ = self._receive()
        if (threads := opened.get("threads")) != self.threads:
            reason = f"ONNX Runtime Web was asked for {self.threads} threads and runs with {threads}"
            raise WorkloadRefused(self.target, reason)
        self._inputs = tuple(opened["inputs"])

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call.

        Raises:
            RecipeError: an input is missing.
            ArtifactError: the file cannot be run on these feeds, or the child died; in its own words.
        """
        _, outputs = self._ask([feeds])
        return {name: array.copy() for name, array in outputs.items()}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds by the child's clock, rotating through `feeds`; raises as `infer`."""
        answer, _ = self._ask(feeds, samples)
        times: list[int] = answer["times_ns"]
        return times

    def _ask(self, feeds: Sequence[Feeds], samples: int | None = None) -> tuple[dict[str, Any], dict[str, Array]]:
        """The answer to one request."""
        arrays: dict[str, Array] = {}
        for index, feed in enumerate(feeds):
            if missing := sorted(set(self._inputs) - set(feed)):
                raise RecipeError(f"{self.path}: inputs {missing} are not fed, got {sorted(feed)}")
            arrays |= {f"{index}/{name}": np.asarray(feed[name]) for name in self._inputs}
        try:
            send(self._running().stdin, {} if samples is None else {"samples": samples}, arrays)
        except BrokenPipeError:
            raise self._died() from None
        return self._receive()

    def _receive(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """The child's next message; raises ArtifactError for one that tells an error, and where the child died."""
        try:
            answer, arrays = receive(self._running().stdout)
        except EOFError:
            raise self._died() from None
        except ValueError as error:
            raise ArtifactError(f"{self.path}: Node sent what is no answer: {error}") from None
        if "error" in answer:
            version = self.versions["onnxruntime-web"]
            raise ArtifactError(f"ONNX Runtime Web {version} cannot run {self.path}: {answer['error']}")
        return answer, arrays

    def _died(self) -> ArtifactError:
        """What to raise where the child is gone: the last of the lines that it printed which says something."""
        code = self._code()
        said = [line for line in self._printed() if not NO_REASON.match(line)]
        return ArtifactError(
            f"{self.path}: Node ended in ONNX Runtime Web ({'no exit code' if code is None else code}): "
            f"{said[-1] if said else 'it said nothing'}"
        )
