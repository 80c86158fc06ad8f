"""Runs a .pte file on the host: ExecuTorch's runtime for Python, whose threads are those of the whole process."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import torch

from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable
from toolchain.on_device.runner import time_calls_ns
from toolchain.targets.base import Arrays, Feeds

FORWARD = "forward"
"""The method of the smallest batch, which is what other programs call when they name none; those of others begin with it."""
DESCRIPTION = "slimvit"
"""The method that returns what a file says of itself, as JSON."""
Call = Callable[[Feeds], Sequence[torch.Tensor]]


class PteRunner:
    """A program of ExecuTorch, on as many threads as are asked for; inputs and outputs have the names of the ONNX file.

    Threads are set for the whole process before the program is loaded, and read back. While one is open, none with another count
    can be opened: its threads would be taken away.
    """

    open_counts: ClassVar[list[int]] = []
    """Thread counts of the runners of this process that are open."""

    def __init__(self, path: Path, threads: int, target: str) -> None:
        self.path, self.threads = path, threads
        self._target = target
        self._methods: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._program: Any = None
        self._inputs: tuple[str, ...] = ()
        self._outputs: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        if not self.path.is_file():
            raise StorageError(f"there is no file {self.path}")
        self._set_threads()
        try:
            self._load()
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(f"ExecuTorch cannot load {self.path}: {error}") from error
        self.open_counts.append(self.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._methods, self._program = {}, None
        self.open_counts.remove(self.threads)

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array. A batch without a method of its own is split, and its last part filled with what repeats.

        Raises:
            RecipeError: an input is missing, or one sample has another shape than the file was built for.
        """
        shapes = self._shapes(feeds)
        if shapes in self._methods or not self._known_sample(shapes):
            return self._outputs_of(feeds)
        batch, known = shapes[0][0], sorted(each[0][0] for each in self._methods)
        step = max((each for each in known if each <= batch), default=known[0])
        parts = []
        for start in range(0, batch, step):
            rows = np.minimum(np.arange(start, start + step), batch - 1)
            outputs = self._outputs_of({name: np.ascontiguousarray(feeds[name][rows]) for name in self._inputs})
            parts.append({name: values[: batch - start] for name, values in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` synchronous calls in nanoseconds; inputs enter without a copy. Raises as `infer`."""
        if len({self._shapes(feed) for feed in feeds}) > 1:
            raise RecipeError(f"{self.path}: one timing needs feeds of one shape")
        return time_calls_ns(self._call(feeds[0]), feeds, samples)

    def _set_threads(self) -> None:
        """Raises TargetUnavailable where the process has other threads than were asked for."""
        library = importlib.import_module("executorch.extension.pybindings.portable_lib")
        set_threads, threads_now = library._unsafe_reset_threadpool, library._threadpool_get_thread_count  # noqa: SLF001
        others = set(self.open_counts) - {self.threads}
        if not others and threads_now() != self.threads:
            set_threads(self.threads)
        count = threads_now()
        if count != self.threads:
            raise TargetUnavailable(
                self._target,
                f"ExecuTorch has one number of threads for a process: {self.threads} were asked for, and it runs with {count}",
            )

    def _load(self) -> None:
        """Loads every method, and what the file says of its names."""
        runtime = importlib.import_module("executorch.runtime").Runtime.get()
        self._program = runtime.load_program(self.path)
        if DESCRIPTION not in self._program.method_names:
            raise ValueError("it does not say what its inputs and outputs are called; slimvit did not build it")
        (text,) = self._program.load_method(DESCRIPTION).execute(())
        described = json.loads(text)
        self._inputs = tuple(each["name"] for each in described["inputs"])
        self._outputs = tuple(described["outputs"])
        for name in self._program.method_names:
            if name.startswith(FORWARD):
                method = self._program.load_method(name)
                meta = method.metadata
                shapes = tuple(tuple(meta.input_tensor_meta(at).sizes()) for at in range(meta.num_inputs()))
                self._methods[shapes] = method

    def _shapes(self, feeds: Feeds) -> tuple[tuple[int, ...], ...]:
        missing = [name for name in self._inputs if name not in feeds]
        if missing:
            raise RecipeError(f"{self.path}: input {missing[0]!r} got nothing")
        return tuple(np.shape(feeds[name]) for name in self._inputs)

    def _known_sample(self, shapes: tuple[tuple[int, ...], ...]) -> bool:
        """Whether some method takes samples of these shapes, in a batch of its own."""
        samples = {tuple(shape[1:] for shape in each) for each in self._methods}
        batches = {shape[:1] for shape in shapes}
        return len(batches) == 1 and () not in batches and tuple(shape[1:] for shape in shapes) in samples

    def _outputs_of(self, feeds: Feeds) -> Arrays:
        outputs = self._call(feeds)(feeds)
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, outputs, strict=True)}

    def _call(self, feeds: Feeds) -> Call:
        """What runs feeds of these shapes."""
        if self._program is None:
            raise RuntimeError("PteRunner is used outside its `with` block")
        shapes = self._shapes(feeds)
        if shapes not in self._methods:
            known = " or ".join(str([list(each) for each in shape]) for shape in sorted(self._methods))
            raise RecipeError(
                f"{self.path} was built for inputs of {known}, got {[list(each) for each in shapes]}; name the batch in "
                "engine.batch, and build again"
            )
        return functools.partial(_execute, self._methods[shapes], self._inputs)


def _execute(method: Any, names: Sequence[str], feeds: Feeds) -> Sequence[torch.Tensor]:
    """One call; what comes back belongs to the caller."""
    outputs: Sequence[torch.Tensor] = method.execute([torch.from_numpy(feeds[name]) for name in names])
    return outputs
