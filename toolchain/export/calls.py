"""A file as a function from images to logits, whatever its input is; and what a file says about that input."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from toolchain.artifact import Preprocess
from toolchain.errors import ArtifactError
from toolchain.export.onnx_graph import INPUT, OUTPUT, read_onnx
from toolchain.export.pixels import takes_pixels, to_pixels
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
    for entry in model.metadata_props:
        if entry.key == PREPROCESS:
            try:
                return Preprocess.from_dict(json.loads(entry.value))
            except (json.JSONDecodeError, ArtifactError) as error:
                raise ArtifactError(f"{path} has damaged metadata: {PREPROCESS}: {error}") from None
    raise ArtifactError(f"{path} does not say how its input is preprocessed: slimvit did not write it")


@contextlib.contextmanager
def opened(target: str, path: Path, threads: int = 1, described_by: Path | None = None) -> Iterator[Call]:
    """Images [B, C, H, W] → logits [B, classes] of a file, in a block; one that takes pixels is given the closest ones.

    Args:
        target: what runs it.
        path: an ONNX file, or an engine.
        threads: intra-op threads.
        described_by: the ONNX file that an engine was built from.

    Raises:
        StorageError, ArtifactError, TargetUnavailable: it cannot be opened.
    """
    feeds = feeding(described_by or path)
    with get_target(target).open(path, threads) as runner:
        yield lambda images: runner.infer(feeds(images))[OUTPUT]


def feeding(path: Path) -> Callable[[Array], dict[str, Array]]:
    """Images [B, C, H, W] → the feeds of a file: themselves, or the pixels closest to them if it takes pixels.

    Raises:
        StorageError, ArtifactError: it cannot be read.
    """
    model = read_onnx(path)
    if not takes_pixels(model):
        return lambda images: {INPUT: images}
    preprocess = preprocess_in(model, path)
    return lambda images: {INPUT: to_pixels(images, preprocess)}
