"""Runs a TensorRT engine on the GPU, for both of NVIDIA's runtimes; how a call is timed is in `gpu`."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch

from toolchain.errors import ArtifactError, StorageError, fault_words
from toolchain.targets.base import Arrays, Feeds
from toolchain.targets.gpu import GpuRunner, capture, local_capability, to_host
from toolchain.targets.mode import Mode
from toolchain.targets.tensorrt.options import BuiltEngine, opened_runtime

log = logging.getLogger(__name__)

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class TrtRunner(GpuRunner):
    """An engine on the GPU; inputs stay on the device unless the mode says otherwise."""

    def __init__(self, trt: ModuleType, logger: Any, path: Path, mode: Mode) -> None:
        super().__init__(mode)
        self.path = path
        self._trt, self._logger = trt, logger
        self._engine: Any = None
        self._context: Any = None

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            serialized = self.path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read the engine {self.path}: {fault_words(error)}") from error
        described = self.path.with_name("engine.json").is_file()
        record = BuiltEngine.beside(self.path) if described else BuiltEngine()
        runtime = opened_runtime(self._trt, self._logger, record.options)
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise ArtifactError(
                f"{self._trt.__name__} {self._trt.__version__} cannot load {self.path}: {self._logger.last_error()}. "
                f"An engine fits one runtime version and the GPUs it was built for (here {local_capability()})."
            )
        self._runtime, self._engine, self._context = runtime, engine, engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self.inputs = [name for name in names if is_input[name]]
        self.outputs = [name for name in names if not is_input[name]]
        return self

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self._context = self._engine = self._runtime = None  # in this order: each needs the next

    def launch(self, feeds: Feeds) -> _TrtLaunch:
        """A call on these inputs; raises ArtifactError if their shapes are outside the optimization profile."""
        if self._context is None:
            raise RuntimeError("TrtRunner is used outside its `with` block")
        inputs = {name: to_host(feeds[name], self._dtype(name)).to("cuda") for name in self.inputs}
        launched = _TrtLaunch(self, inputs, {})
        self.set_shapes(inputs)
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            launched.outputs[name] = torch.empty(shape, dtype=self._dtype(name), device="cuda")
        return launched

    def set_shapes(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Tells the execution context the shapes of the inputs; raises ArtifactError if the profile excludes them."""
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise ArtifactError(
                    f"{self.path}: input {name!r} of shape {tuple(tensor.shape)} is outside the optimization profile. "
                    "Build the engine with a wider engine.batch."
                )

    def enqueue(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts a call that reads and writes these tensors on the stream."""
        for name, tensor in tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ArtifactError(f"{self.path} fails to run: {self._logger.last_error()}")

    def capture(self, enqueue: Callable[[], object]) -> Callable[[], object]:
        """What replays `enqueue` as a CUDA graph on the runner's stream."""
        return capture(enqueue, self._stream)

    def _dtype(self, name: str) -> torch.dtype:
        return TORCH_DTYPES[self._engine.get_tensor_dtype(name).name]


@dataclass(frozen=True)
class _TrtLaunch:
    """One call of an engine: the context is told the shapes and addresses anew, as other calls share it."""

    runner: TrtRunner
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]

    def enqueue(self) -> None:
        self.runner.set_shapes(self.inputs)
        self.runner.enqueue({**self.inputs, **self.outputs})

    def captured(self) -> Callable[[], object]:
        return self.runner.capture(self.enqueue)


class OnnxTrtRunner:
    """An ONNX file on the GPU: for each batch and shape that it is given, the engine that `built` returns for it.

    `built` is given the batch, and the shape of one sample where the file has one input.
    """

    def __init__(
        self, built: Callable[[int, tuple[int, ...] | None], Path], opened: Callable[[Path], TrtRunner]
    ) -> None:
        self._built, self._opened = built, opened
        self._runners: dict[tuple[tuple[int, ...], ...], TrtRunner] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._runners = {}
        self._stack.close()

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call; raises as `TensorRT.build` does where the engine has to be built."""
        return self._runner(feeds).infer(feeds)

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """One sample for each of `samples` calls in nanoseconds, as `GpuRunner.time_ns` gives it."""
        return self._runner(feeds[0]).time_ns(feeds, samples)

    def device_bytes(self) -> int | None:
        """As `GpuRunner.device_bytes`, since the first engine was opened."""
        return max((runner.device_bytes() or 0 for runner in self._runners.values()), default=0) or None

    def _runner(self, feeds: Feeds) -> TrtRunner:
        shapes = tuple(values.shape for values in feeds.values())
        if shapes not in self._runners:
            batch, *sample = shapes[0]
            engine = self._built(batch, tuple(sample) if len(shapes) == 1 else None)
            self._runners[shapes] = self._stack.enter_context(self._opened(engine))
        return self._runners[shapes]


@functools.cache
def forwarding_logger(module: str) -> Any:
    """The one logger of a TensorRT module (it keeps the first it is given): into `logging`, errors also into `errors`."""
    trt = importlib.import_module(module)

    class Forward(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg.strip())  # the caller raises them
            log.log(logging.INFO if severity == trt.ILogger.Severity.WARNING else logging.DEBUG, "%s", msg.strip())

        def last_error(self) -> str:
            """The last error that TensorRT reported, or that it reported none."""
            return self.errors[-1] if self.errors else "TensorRT gave no reason"

    return Forward()
