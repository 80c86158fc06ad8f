"""A file as a function from images to its outputs, whatever its input is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.export.inputs import declared_preprocess, input_of, preprocess_in
from toolchain.export.onnx_graph import (
    OUTPUT,
)
from toolchain.export.quantise import STEP
from toolchain.model import Preprocess
from toolchain.targets import get_target

Array = NDArray[Any]
Call = Callable[[Array], Array]
Outputs = Callable[[Array], dict[str, Array]]


@contextlib.contextmanager
def opened(
    target: str,
    path: Path,
    threads: int = 1,
    described_by: Path | None = None,
    *,
    preprocess: Preprocess | None = None,
) -> Iterator[Call]:
    """Images [B, C, H, W] → the output "logits" [B, …] of a file, or its first where there is none of that name, in a block.

    Arguments, batches and errors are those of `opened_outputs`.
    """
    with opened_outputs(target, path, threads, described_by, preprocess=preprocess) as run:

        def call(images: Array) -> Array:
            outputs = run(images)
            return outputs[OUTPUT] if OUTPUT in outputs else next(iter(outputs.values()))

        yield call


@contextlib.contextmanager
def opened_outputs(
    target: str,
    path: Path,
    threads: int = 1,
    described_by: Path | None = None,
    *,
    preprocess: Preprocess | None = None,
) -> Iterator[Outputs]:
    """Images [B, C, H, W] → name → output of a file, in a block.

    A file of a fixed batch is called at that batch, the last time with images repeated; others with at most `STEP` images.

    Args:
        target: what runs it.
        path: an ONNX file, or an engine.
        threads: intra-op threads.
        described_by: the ONNX file that an engine was built from.
        preprocess: how the images were prepared, for a file that takes pixels; None is what it says itself.

    Raises:
        StorageError, ArtifactError, TargetUnavailable, RecipeError: it cannot be opened, or takes no images.
    """
    file = described_by or path
    model = read_onnx(file)
    feeds, batch = _feeds_of(model, file, preprocess), input_of(model, file).batch
    del model
    with get_target(target).open(path, threads) as runner:

        def call(images: Array) -> dict[str, Array]:
            found = {name: np.asarray(values) for name, values in runner.infer(feeds(images)).items()}
            return {name: v.astype(np.float32) if v.dtype == np.float16 else v for name, v in found.items()}

        yield in_parts(call, batch or STEP, fill=batch is not None)


def in_parts(call: Outputs, step: int, *, fill: bool = False) -> Outputs:
    """The same function of any number of images, at most `step` at a time.

    Args:
        call: the function.
        step: how many.
        fill: whether it takes exactly as many: images are repeated for the last part, and what they give is dropped.
    """

    def run(images: Array) -> dict[str, Array]:
        if len(images) == step or (len(images) < step and not fill):
            return call(images)
        parts = []
        for start in range(0, len(images), step):
            part = images[start : start + step]
            whole = np.resize(part, (step, *part.shape[1:])) if fill and len(part) < step else part
            rows = {name: np.atleast_1d(values) for name, values in call(whole).items()}
            parts.append({name: v[: len(part)] if len(v) == len(whole) else v for name, v in rows.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return run


def feeding(path: Path, preprocess: Preprocess | None = None) -> Callable[[Array], dict[str, Array]]:
    """Images [B, C, H, W] → the feeds of a file: themselves in its type, or the pixels closest to them if it takes pixels.

    Args:
        path: an ONNX file.
        preprocess: how the images were prepared; None is what the file says itself.

    Raises:
        StorageError, ArtifactError, RecipeError: it cannot be read, or takes no images.
    """
    return _feeds_of(read_onnx(path), path, preprocess)


def _feeds_of(model: onnx.ModelProto, path: Path, preprocess: Preprocess | None) -> Callable[[Array], dict[str, Array]]:
    image, own = input_of(model, path), declared_preprocess(model, path)
    how = own or preprocess
    if image.takes_pixels and how is None:
        how = preprocess_in(model, path)
    return lambda images: image.feeds(images, how)
