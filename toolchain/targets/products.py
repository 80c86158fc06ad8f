"""Runs a file of products as fast as its runtime can: inputs made here, nothing copied in or out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx_ir import DataType

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.on_device.runner import OrtRunner, time_calls_ns
from toolchain.targets import Feeds, Runner
from toolchain.targets.base import PRODUCTS, Arrays
from toolchain.targets.openvino_cpu import OPENVINO_CPU, OPENVINO_CPU_BF16, OpenVinoCpu, OpenVinoRunner
from toolchain.targets.ort import ORT_CPU


class OrtProducts(OrtRunner):
    """Products in ONNX Runtime; outputs of one shape share one buffer, as they come and go in a model."""

    def __enter__(self) -> Self:
        super().__enter__()
        import onnxruntime as ort

        self._binding = self._session.io_binding()
        self._kept = own_inputs(Path(self.path))
        for name, array in self._kept.items():
            self._binding.bind_cpu_input(name, array)
        buffers: dict[tuple[tuple[int, ...], str], Any] = {}
        self._outputs: dict[str, ort.OrtValue] = {}
        for output in self._session.get_outputs():
            key = tuple(output.shape), output.type
            if key not in buffers:
                dtype = _dtype(output.type)
                buffers[key] = ort.OrtValue.ortvalue_from_shape_and_type(list(output.shape), dtype, "cpu")
            self._outputs[output.name] = buffers[key]
            self._binding.bind_ortvalue_output(output.name, buffers[key])
        return self

    def infer(self, feeds: Feeds) -> Arrays:  # noqa: ARG002
        """Output name → what its buffer holds after a call."""
        self._session.run_with_iobinding(self._binding)
        return {name: value.numpy() for name, value in self._outputs.items()}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds."""

        def call(_: Feeds) -> None:
            self._session.run_with_iobinding(self._binding)

        return time_calls_ns(call, feeds, samples)


class OpenVinoProducts(OpenVinoRunner):
    """Products in OpenVINO; inputs are set once, as handing them over costs more than a small product."""

    def __enter__(self) -> Self:
        super().__enter__()
        self._kept = own_inputs(self.path)
        return self

    def infer(self, feeds: Feeds) -> Arrays:  # noqa: ARG002
        """Output name → array for one call."""
        return super().infer(self._kept)

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds."""
        request = self.request(self._kept)
        request.infer(self._kept, share_inputs=True, share_outputs=True)

        def call(_: Feeds) -> None:
            request.start_async()
            request.wait()

        return time_calls_ns(call, feeds, samples)


def _openvino(target: OpenVinoCpu) -> Callable[[str, int], Runner]:
    return lambda path, threads: OpenVinoProducts(Path(path), threads, target.precision, target=target.name)


OPENERS: dict[str, Callable[[str, int], Runner]] = {
    PRODUCTS + ORT_CPU.name: OrtProducts,
    **{PRODUCTS + target.name: _openvino(target) for target in (OPENVINO_CPU, OPENVINO_CPU_BF16)},
}


def own_inputs(path: Path) -> Arrays:
    """Input name → what a file of products is fed: standard normal floats, integers of their type's whole range.

    Inputs of one shape and type are one array, which stays in the caches: a model reads what it has just written.
    """
    rng = np.random.default_rng(0)
    arrays: dict[tuple[tuple[int, ...], Any], NDArray[Any]] = {}
    inputs: Arrays = {}
    for value in OnnxFile(path).model.graph.input:
        shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if (shape, dtype) not in arrays:
            if dtype.kind == "f":
                arrays[shape, dtype] = rng.standard_normal(shape).astype(dtype)
            else:
                limits = np.iinfo(dtype)
                arrays[shape, dtype] = rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
        inputs[value.name] = arrays[shape, dtype]
    return inputs


def _dtype(text: str) -> np.dtype[Any]:
    """ONNX Runtime's "tensor(float)" as numpy's type."""
    return DataType[text.removeprefix("tensor(").removesuffix(")").upper()].numpy()
