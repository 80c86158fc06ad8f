"""Runs a graph on images, by ONNX Runtime on the CPU, and records outputs and the largest intermediate values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.artifacts.onnx_plain import copied
from toolchain.artifacts.onnx_walk import linked
from toolchain.errors import ArtifactError
from toolchain.export.large import detached, is_large, stored_bytes, with_shapes
from toolchain.export.scratch import exchange
from toolchain.model import IMAGE

Array = NDArray[Any]
AXIS = "slimvit.observed"
STEP = 32
"""Images of one call while activations are observed."""


def steps(images: Array, step: int = STEP) -> Iterator[dict[str, Array]]:
    """The images as inputs of `step` at a time."""
    for start in range(0, len(images), step):
        yield {IMAGE: images[start : start + step]}


def largest_channels(model: onnx.ModelProto, names: Sequence[str], images: Array) -> dict[str, Array]:
    """Value → max|x| of each of its channels (its last axis) over images.

    Raises:
        ArtifactError: ONNX Runtime cannot run the graph.
    """
    return _largest(model, names, images, by_channel=True)


def largest_values(model: onnx.ModelProto, images: Array) -> dict[str, float]:
    """Every value that a graph computes in fp32 → its max|x| over images; raises as `largest_channels`."""
    computed = (value for node in linked(with_shapes(model)).graph for value in node.outputs)
    names = [str(value.name) for value in computed if value.dtype == ir.DataType.FLOAT]
    return {name: float(most) for name, most in _largest(model, names, images, by_channel=False).items()}


def _largest(model: onnx.ModelProto, names: Sequence[str], images: Array, *, by_channel: bool) -> dict[str, Array]:
    """Taken inside the graph, so that no activation leaves it."""

    def watch(model: onnx.ModelProto) -> None:
        del model.graph.output[:]
        for name in names:
            flat, largest = f"{name}.flat", f"{name}.largest"
            model.graph.node.extend(
                [
                    onnx.helper.make_node("Abs", [name], [f"{name}.abs"]),
                    onnx.helper.make_node("Flatten", [f"{name}.abs"], [flat], axis=-1 if by_channel else 0),
                    onnx.helper.make_node("ReduceMax", [flat, f"{AXIS}.axes"], [largest], keepdims=0),
                ]
            )
            model.graph.output.append(onnx.ValueInfoProto(name=largest))
        axis = 0 if by_channel else 1  # flattened from the front, a value is one row
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis], np.int64), f"{AXIS}.axes"))

    found: dict[str, Array] = {}
    if not names:
        return found
    with session(model, watch) as run:
        for feeds in steps(images):
            for key, values in run([f"{name}.largest" for name in names], feeds).items():
                name = key.removesuffix(".largest")
                most = values if by_channel else values.max()
                found[name] = np.maximum(found[name], most) if name in found else most
    return found


def peaks(model: onnx.ModelProto, names: Sequence[str], images: Array) -> dict[str, float]:
    """Value → the largest max x² / E x² of it over calls on images: how far its largest number is from the usual ones."""

    def watch(model: onnx.ModelProto) -> None:
        del model.graph.output[:]
        for name in names:
            square = f"{name}.square"
            model.graph.node.append(onnx.helper.make_node("Mul", [name, name], [square]))
            for operator in ("Max", "Mean"):
                made = onnx.helper.make_node(f"Reduce{operator}", [square], [f"{name}.{operator}"], keepdims=0)
                model.graph.node.append(made)
                model.graph.output.append(onnx.ValueInfoProto(name=made.output[0]))

    found = dict.fromkeys(names, 0.0)
    with session(model, watch) as run:
        for feeds in steps(images):
            values = run([f"{name}.{operator}" for name in names for operator in ("Max", "Mean")], feeds)
            for name in names:
                most, mean = (float(values[f"{name}.{operator}"]) for operator in ("Max", "Mean"))
                found[name] = max(found[name], most / mean if mean > 0 else 0.0)
    return found


@contextmanager
def session(
    model: onnx.ModelProto, change: Callable[[onnx.ModelProto], None] = lambda _: None
) -> Iterator[Callable[[Sequence[str], Mapping[str, Array]], dict[str, Array]]]:
    """(names of outputs, inputs) → outputs of a graph on the CPU, in a block; a copy of it is changed before."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others may work on this machine
    with exchange() as folder:
        path = folder / "model.onnx"
        save(model, path, change)
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot load the graph to be quantised: {error}") from error
        yield lambda names, feeds: dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


def save(model: onnx.ModelProto, path: Path, change: Callable[[onnx.ModelProto], None] = lambda _: None) -> None:
    """Writes a changed copy of a graph; of large weights there is no copy in memory."""
    large = is_large(stored_bytes(model))
    changed = detached(model, path.with_name(f"{path.name}.data")) if large else copied(model)
    change(changed)
    onnx.save_model(changed, path)
