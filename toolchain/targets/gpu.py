"""Times calls on an NVIDIA GPU: a few named modes, and the timing code that all GPU runners share.

A mode is part of a target's name ("trt+graph"), so that samples of two modes are never compared by accident.
Torch owns the device memory, the streams; the runtimes only enqueue their work.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.on_device.runner import time_calls_ns
from toolchain.targets.base import Arrays, Feeds
from toolchain.targets.mode import Mode


class Launch(Protocol):
    """Inputs and outputs of one call at fixed addresses on the device."""

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """Input name → its tensor on the device."""
        ...

    @property
    def outputs(self) -> Mapping[str, torch.Tensor]:
        """Output name → its tensor on the device."""
        ...

    def enqueue(self) -> None:
        """Puts the call on the runner's stream and returns at once."""
        ...

    def captured(self) -> Callable[[], object]:
        """What replays the call as a CUDA graph, and returns at once."""
        ...


class GpuRunner(ABC):
    """Base of the GPU runners: a subclass opens the file and makes a `Launch`; here it is run and timed.

    Every set of feeds gets device memory, and in mode `graph` a CUDA graph, of its own, made before anything is timed
    and kept for as long as the next calls use the same feeds.

    Args:
        mode: what one sample holds.
        cuda: torch's module of that name, or what stands for it.
    """

    def __init__(self, mode: Mode, cuda: Any = torch.cuda) -> None:
        self.mode, self._cuda = mode, cuda
        self._stream: Any = None
        self._free_bytes = 0
        self._calls: dict[int, tuple[Feeds, _Call]] = {}

    def __enter__(self) -> Self:
        self._stream = self._cuda.Stream()
        self._free_bytes = self._cuda.mem_get_info()[0]
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.synchronize()
        self._calls = {}

    def device_bytes(self) -> int | None:
        """Device memory that went since the block was entered: weights, workspaces, inputs and outputs; None if none did.

        CUDA's own context was there before. What other processes took meanwhile is in it.
        """
        taken: int = self._free_bytes - self._cuda.mem_get_info()[0]
        return taken if taken > 0 else None

    @property
    def stream(self) -> Any:
        """The stream that all of its work is on."""
        return self._stream

    @abstractmethod
    def launch(self, feeds: Feeds) -> Launch:
        """A call on these inputs, which are on the device when this returns."""

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call."""
        with self._cuda.stream(self._stream):
            launched = self.launch(feeds)
            launched.enqueue()
            host = {name: tensor.to("cpu") for name, tensor in launched.outputs.items()}
        # numpy has no bfloat16
        return {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in host.items()}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds; a call starts when the one before has ended."""
        with self._cuda.stream(self._stream):
            prepared = self._prepared(feeds)
            self._stream.synchronize()
            return time_calls_ns(lambda feed: prepared[id(feed)](), feeds, samples)

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in host memory that the device reads and writes by itself."""
        return tensor.pin_memory()

    def woken(self) -> Any:
        """An event for which the host sleeps."""
        return self._cuda.Event(blocking=True)

    def _prepared(self, feeds: Sequence[Feeds]) -> dict[int, _Call]:
        """A call for each of these feeds; those that are not among them are let go."""
        wanted = {id(feed): feed for feed in feeds}
        self._calls = {key: kept for key, kept in self._calls.items() if key in wanted and kept[0] is wanted[key]}
        for key, feed in wanted.items():
            if key not in self._calls:
                self._calls[key] = feed, _Call(self.launch(feed), feed, self)
        return {key: made for key, (_, made) in self._calls.items()}


class _Call:
    """One call that can be repeated: fixed memory on both sides, a graph if the mode asks for it, and how to wait."""

    def __init__(self, launched: Launch, feeds: Feeds, runner: GpuRunner) -> None:
        mode = runner.mode
        self.launched, self.stream = launched, runner.stream
        self._run: Callable[[], object] = launched.captured() if mode.graph else launched.enqueue
        self._host_in, self._host_out = {}, {}
        if mode.transfers:
            self._host_in = {
                name: runner.pinned(to_host(feeds[name], tensor.dtype)) for name, tensor in launched.inputs.items()
            }
            self._host_out = {
                name: runner.pinned(torch.empty_like(tensor, device="cpu")) for name, tensor in launched.outputs.items()
            }
        self._woken = runner.woken()

    def __call__(self) -> None:
        """Runs it to its end."""
        for name, tensor in self._host_in.items():
            self.launched.inputs[name].copy_(tensor, non_blocking=True)
        self._run()
        for name, tensor in self._host_out.items():
            tensor.copy_(self.launched.outputs[name], non_blocking=True)
        self._woken.record(self.stream)
        self._woken.synchronize()  # the host sleeps until it is woken


def capture(enqueue: Callable[[], object], stream: Any) -> Callable[[], object]:
    """What replays all that `enqueue` puts on `stream`, as a CUDA graph."""
    enqueue()  # a runtime allocates and chooses kernels in its first call; neither can be captured
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        enqueue()
    return graph.replay


def to_host(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The array as a tensor in host memory that owns what it holds."""
    return torch.from_numpy(np.array(array, order="C")).to(dtype)


def no_gpu() -> str | None:
    """Why torch cannot use an NVIDIA GPU here, or None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="CUDA initialization", category=UserWarning)  # an old driver
        return None if torch.cuda.is_available() else "no NVIDIA driver or GPU"


def local_capability() -> str:
    """Compute capability of torch's current GPU, such as "8.9"."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def local_gpu() -> str:
    """Name of torch's current GPU, with its compute capability."""
    return f"{torch.cuda.get_device_name()} (compute capability {local_capability()})"
