"""Runs a TensorRT engine on the GPU, for both of NVIDIA's runtimes; torch owns the device memory and the clock."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.errors import ArtifactError, StorageError
from toolchain.targets.base import Feeds

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


class TrtRunner:
    """An engine on the GPU. Arrays are copied to the device and back by `infer`; `time_ns` times the engine alone."""

    def __init__(self, trt: ModuleType, logger: Any, path: Path) -> None:
        self.path = path
        self._trt, self._logger = trt, logger
        self._engine: Any = None
        self._context: Any = None

    def __enter__(self) -> Self:
        try:
            serialized = self.path.read_bytes()
        except OSError as error:
            raise StorageError(f"cannot read the engine {self.path}: {error.strerror}") from error
        runtime = self._trt.Runtime(self._logger)
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise ArtifactError(
                f"{self._trt.__name__} {self._trt.__version__} cannot load {self.path}: {self._logger.last_error()}. "
                f"An engine fits one runtime version and the GPUs it was built for (here {local_capability()})."
            )
        self._runtime, self._engine, self._context = runtime, engine, engine.create_execution_context()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.synchronize()
        self._context = self._engine = self._runtime = None  # in this order: each needs the next

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Output name → array for one call."""
        with torch.cuda.stream(self._stream):
            inputs = self._to_device(feeds)  # alive until the call has ended
            outputs = self._bind(inputs)
            self._execute()
            host = {name: tensor.to("cpu") for name, tensor in outputs.items()}
        # numpy has no bfloat16
        return {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in host.items()}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Time of the engine on the device for each of `samples` calls in nanoseconds, by CUDA events.

        Inputs are on the device before and outputs stay there; a call starts when the one before has ended.
        """
        times = []
        with torch.cuda.stream(self._stream):
            on_device = [self._to_device(feed) for feed in feeds]
            for index in range(samples):
                outputs = self._bind(on_device[index % len(feeds)])
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                self._stream.synchronize()
                start.record(self._stream)
                self._execute()
                end.record(self._stream)
                end.synchronize()
                times.append(round(start.elapsed_time(end) * 1e6))  # milliseconds
                del outputs  # only now may their memory be used again
        return times

    def _to_device(self, feeds: Feeds) -> dict[str, torch.Tensor]:
        if self._context is None:
            raise RuntimeError("TrtRunner is used outside its `with` block")
        dtypes = {name: TORCH_DTYPES[self._engine.get_tensor_dtype(name).name] for name in self._inputs}
        return {
            name: torch.from_numpy(np.ascontiguousarray(feeds[name])).to("cuda", dtypes[name]) for name in self._inputs
        }

    def _bind(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Output tensors that fit the inputs, after both were given to the execution context."""
        context = self._context
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise ArtifactError(
                    f"{self.path}: input {name!r} of shape {tuple(tensor.shape)} is outside the optimization profile. "
                    "Build the engine with a wider engine.batch."
                )
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name in self._outputs:
            dtype = TORCH_DTYPES[self._engine.get_tensor_dtype(name).name]
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ArtifactError(f"{self.path} fails to run: {self._logger.last_error()}")


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
