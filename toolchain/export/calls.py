"""A file as a function from images to one of its outputs, whatever its input is; and what it says about that input."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toolchain.artifact import Preprocess
from toolchain.errors import ArtifactError
from toolchain.export.inputs import input_of
from toolchain.export.onnx_graph import OUTPUT, read_onnx
from toolchain.targets import get_target

Array = NDArray[Any]
Call = Callable[[Array], Array]
PREPROCESS = "slimvit.preprocess"


def read_preprocess(path: Path) -> Preprocess:
    """What an ONNX file that `Export` wrote says about its input.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it is damaged, or was not written by slimvit.
    """
    return preprocess_in(read_onnx(path), path)


def preprocess_in(model: onnx.ModelProto, path: Path) -> Preprocess:
    """The same for a file that was read already; `path` is for messages."""
    preprocess = declared_preprocess(model, path)
    if preprocess is None:
        raise ArtifactError(
            f"{path} does not say how its input is preprocessed: slimvit did not write it. Name --mean and --std, and "
            "--crop-pct where pictures are cropped; in a gate they are mean, std and crop_pct of [data]."
        )
    return preprocess


def declared_preprocess(model: onnx.ModelProto, path: Path) -> Preprocess | None:
    """What a file says about its input, None if nothing; raises ArtifactError if it is damaged."""
    for entry in model.metadata_props:
        if entry.key == PREPROCESS:
            try:
                return Preprocess.from_dict(json.loads(entry.value))
            except (json.JSONDecodeError, ArtifactError) as error:
                raise ArtifactError(f"{path} has damaged metadata: {PREPROCESS}: {error}") from None
    return None


@contextlib.contextmanager
def opened(
    target: str,
    path: Path,
    threads: int = 1,
    described_by: Path | None = None,
    *,
    output: str = "",
    preprocess: Preprocess | None = None,
) -> Iterator[Call]:
    """Images [B, C, H, W] → one output [B, …] of a file, in a block.

    A file of a fixed batch is called at that batch, the last time with images repeated.

    Args:
        target: what runs it.
        path: an ONNX file, or an engine.
        threads: intra-op threads.
        described_by: the ONNX file that an engine was built from.
        output: which output; "" is "logits", or the first where there is none of that name.
        preprocess: how the images were prepared, for a file that takes pixels; None is what it says itself.

    Raises:
        StorageError, ArtifactError, TargetUnavailable, RecipeError: it cannot be opened, or takes no images.
    """
    feeds = feeding(described_by or path, preprocess)
    batch = input_of(read_onnx(described_by or path), described_by or path).batch
    with get_target(target).open(path, threads) as runner:

        def call(images: Array) -> Array:
            outputs = runner.infer(feeds(images))
            name = output or (OUTPUT if OUTPUT in outputs else next(iter(outputs)))
            found = np.asarray(outputs[name])
            return found.astype(np.float32) if found.dtype == np.float16 else found

        yield call if batch is None else at_batch(call, batch)


def at_batch(call: Call, batch: int) -> Call:
    """The same function of any number of images, where a file takes exactly `batch` at a time."""

    def run(images: Array) -> Array:
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            whole = np.resize(part, (batch, *part.shape[1:])) if len(part) < batch else part
            parts.append(call(whole)[: len(part)])
        joined: Array = np.concatenate(parts)
        return joined

    return run


def feeding(path: Path, preprocess: Preprocess | None = None) -> Callable[[Array], dict[str, Array]]:
    """Images [B, C, H, W] → the feeds of a file: themselves in its type, or the pixels closest to them if it takes pixels.

    Args:
        path: an ONNX file.
        preprocess: how the images were prepared; None is what the file says itself.

    Raises:
        StorageError, ArtifactError, RecipeError: it cannot be read, or takes no images.
    """
    model = read_onnx(path)
    image, own = input_of(model, path), declared_preprocess(model, path)
    how = own or preprocess
    if image.takes_pixels and how is None:
        how = preprocess_in(model, path)
    return lambda images: image.feeds(images, how)
