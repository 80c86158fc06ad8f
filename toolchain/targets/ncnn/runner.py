"""The runner of an ncnn model: it talks to a child process, and survives the child's crash."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.artifacts.inputs import Port
from toolchain.artifacts.ncnn_format import files_of, inputs_of, read_layers
from toolchain.errors import ArtifactError, RecipeError, TargetUnavailable, WorkloadRefused
from toolchain.targets.base import Arrays, Feeds
from toolchain.targets.child import ChildRunner
from toolchain.targets.ncnn import child
from toolchain.targets.wire import Array, receive, send

NAME = "ncnn"
OPTIONS: Mapping[str, bool | int] = {
    "use_fp16_packed": False,
    "use_fp16_storage": False,
    "use_fp16_arithmetic": False,
    "use_bf16_packed": False,
    "use_bf16_storage": False,
    "openmp_blocktime": 0,
}
"""What ncnn would decide by the processor: with these it multiplies in fp32 whatever type weights are stored in."""
RESTING = {"OMP_WAIT_POLICY": "passive", "OMP_DYNAMIC": "false", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""Threads of OpenMP sleep between calls. ncnn's own option for that works with LLVM's OpenMP alone, and its wheels have GNU's."""
ANSWER_S = 300.0
"""After so many seconds without an answer to one call the process is ended: ncnn may hang in a graph that it misreads."""


class NcnnRunner(ChildRunner):
    """A .param and its .bin in a process of their own, with `threads` threads.

    ncnn knows no batch: arrays have a first dimension of 1, which is taken off and put back.
    """

    target = NAME

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self.versions = {NAME: version(NAME)}
        self._answer_s = ANSWER_S
        self._inputs: tuple[Port, ...] = ()
        self._checked = False

    def _command(self) -> tuple[list[str], dict[str, str]]:
        command = [
            sys.executable,
            "-P",
            "-m",
            child.__name__,
        ]  # no neighbour of where it is started can shadow a library
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH")]))
        return command, {**os.environ, **RESTING, "PYTHONPATH": path}

    def _opened(self) -> None:
        weights, graph = files_of(self.path)
        self._inputs = inputs_of(read_layers(graph))
        files = {"param": str(self.path), "weights": str(weights)}
        request = {"do": "open", **files, "threads": self.threads, "options": dict(OPTIONS)}
        self._require(self._ask(request)[0]["options"])

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call, as the ONNX file gives it: with a batch of 1.

        Raises:
            RecipeError: the feeds have another batch or shape than the file takes.
            ArtifactError: ncnn cannot run the file, or dies or hangs in it.
            TargetUnavailable: other threads work than were asked for.
        """
        answer, outputs = self._ask({"do": "infer", "sets": 1}, self._sets([feeds]))
        if not self._checked and answer["threads"] not in (None, self.threads):
            raise WorkloadRefused(
                NAME, f"ncnn was asked for {self.threads} threads and {answer['threads']} work on {self.path.name}"
            )
        self._checked = True
        return {name: array[np.newaxis] for name, array in outputs.items()}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` synchronous calls in nanoseconds, taken inside the process; raises as `infer`."""
        request = {"do": "time", "sets": len(feeds), "samples": samples}
        times: list[int] = self._ask(request, self._sets(feeds))[0]["times_ns"]
        return times

    def _require(self, taken: Mapping[str, object]) -> None:
        """Raises TargetUnavailable if an option reads back as another."""
        for name, setting in {**OPTIONS, "num_threads": self.threads}.items():
            if taken.get(name) != setting:
                raise WorkloadRefused(
                    NAME, f"ncnn was asked for {name} = {setting!r} and runs with {taken.get(name)!r}"
                )

    def _sets(self, feeds: Sequence[Feeds]) -> dict[str, Array]:
        arrays = {}
        for index, feed in enumerate(feeds):
            for port in self._inputs:
                if port.name not in feed:
                    raise RecipeError(f"{self.path}: input {port.name!r} got nothing")
                array = np.asarray(feed[port.name])
                if array.ndim < 2 or array.shape[0] != 1:
                    raise RecipeError(
                        f"{self.path}: ncnn runs one sample a call, and input {port.name!r} got {list(array.shape)}; ask "
                        "for a batch of 1"
                    )
                if port.shape is not None and array.shape != port.shape:
                    raise RecipeError(
                        f"{self.path}: input {port.name!r} takes {list(port.shape)}, got {list(array.shape)}"
                    )
                arrays[f"{index}/{port.name}"] = array[0].astype(np.float32, copy=False)
        return arrays

    def _ask(
        self, request: Mapping[str, object], arrays: Mapping[str, Array] | None = None
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """The answer to a request; raises ArtifactError where ncnn refuses, dies, or says nothing in time."""
        process = self._running()
        hung: list[bool] = []

        def end() -> None:
            hung.append(True)
            process.kill()

        watch = threading.Timer(self._answer_s, end)
        watch.daemon = True
        if request["do"] != "time":  # that is as long as was asked for, and comes after a call that ended
            watch.start()
        try:
            send(process.stdin, request, arrays)
            answer, outputs = receive(process.stdout)
        except (EOFError, OSError) as error:
            raise self._died(str(request["do"]), hung=bool(hung)) from error
        finally:
            watch.cancel()
        if "error" in answer:
            raise ArtifactError(f"ncnn does not run {self.path}: {answer['error']}{self._said()}")
        return answer, outputs

    def _died(self, what: str, *, hung: bool) -> Exception:
        code = self._code()
        if hung:
            how = f"gave no answer within {self._answer_s:g} s"
        else:
            how = f"ended with {signal.Signals(-code).name if code and code < 0 else f'code {code}'}"
        doing = {"open": "reading", "infer": "running", "time": "timing"}[what]
        said = self._said()
        if "ModuleNotFoundError" in said or "ImportError" in said:
            return TargetUnavailable(NAME, f"the Python module ncnn cannot be loaded{said}")
        return ArtifactError(
            f"ncnn {how} while {doing} {self.path}{said}. It crashes on files that are damaged, or that pnnx did not "
            "convert whole."
        )

    def _said(self) -> str:
        """The last line that the process printed, behind a colon; "" if it was silent."""
        lines = self._printed()
        return f": {lines[-1]}" if lines else ""
