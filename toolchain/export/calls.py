"""Opens an artifact as a function from images to outputs, for any input layout and any runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from toolchain.artifacts import Artifact, open_artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import ArtifactError
from toolchain.export.pixels import to_pixels
from toolchain.model import Preprocess
from toolchain.outputs import LAYER, LOGITS
from toolchain.parity import Arrays
from toolchain.targets import get_target

Array = NDArray[Any]
Call = Callable[[Array], Arrays]
"""Images → outputs: one array, or one each of the layers that are read."""
Outputs = Callable[[Array], dict[str, Array]]
STEP = 32
"""Images that are run at once."""


def step_of(artifact: Artifact) -> int:
    """How many images are judged in a call: one where what it gives for a picture depends on those beside it, else `STEP`."""
    return 1 if isinstance(artifact, OnnxFile) and artifact.scales_by_call else STEP


@contextlib.contextmanager
def opened(
    target: str,
    path: Path,
    threads: int = 1,
    described_by: Artifact | None = None,
    *,
    preprocess: Preprocess | None = None,
    step: int = STEP,
    fill: bool = False,
    rounded: bool = True,
) -> Iterator[Call]:
    """Images [B, C, H, W] → the outputs of a file that are compared and judged, in a block: see `judged`.

    Arguments, batches and errors are those of `opened_outputs`.
    """
    with opened_outputs(
        target, path, threads, described_by, preprocess=preprocess, step=step, fill=fill, rounded=rounded
    ) as run:
        yield lambda images: judged(run(images))


def judged(outputs: Mapping[str, Array]) -> Arrays:
    """The outputs of a file that are compared and judged: "logits", or all of several layers, else the first."""
    layers = tuple(values for name, values in outputs.items() if name.startswith(LAYER))
    if LOGITS in outputs or not layers:
        return outputs.get(LOGITS, next(iter(outputs.values())))
    return layers


@contextlib.contextmanager
def opened_outputs(
    target: str,
    path: Path,
    threads: int = 1,
    described_by: Artifact | None = None,
    *,
    preprocess: Preprocess | None = None,
    step: int = STEP,
    fill: bool = False,
    rounded: bool = True,
) -> Iterator[Outputs]:
    """Images [B, C, H, W] → name → output of an artifact, in a block.

    One of a fixed batch is called at that batch, the last time with images repeated; others with at most `step` images.

    Args:
        target: what runs it, or interprets it where it does not run.
        path: the artifact.
        threads: intra-op threads.
        described_by: the file that an engine was built from, if only that describes the input; else None.
        preprocess: how the images were prepared, for a file that takes pixels; None uses the file's own declaration.
        step: the most images of one call.
        fill: whether every call takes as many, as with a fixed batch.
        rounded: whether an interpreter rounds activations to the types that the file declares.

    Raises:
        StorageError, ArtifactError, TargetUnavailable, RecipeError: it cannot be opened, or takes no images.
    """
    described = described_by or open_artifact(path)
    feeds, batch = feeds_of(described, preprocess), described.image.batch
    del described, described_by  # a graph that holds its weights is large
    with get_target(target).opened(path, threads, rounded=rounded) as runner:

        def call(images: Array) -> dict[str, Array]:
            outputs = {name: np.asarray(values) for name, values in runner.infer(feeds(images)).items()}
            return {name: v.astype(np.float32) if v.dtype == np.float16 else v for name, v in outputs.items()}

        yield in_parts(call, batch or step, fill=fill or batch is not None)


def in_parts(call: Outputs, step: int = STEP, *, fill: bool = False) -> Outputs:
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


def feeds_of(artifact: Artifact, preprocess: Preprocess | None = None) -> Callable[[Array], dict[str, Array]]:
    """Images [B, C, H, W], float32 → the feeds of an artifact: themselves in its type and layout, or the pixels closest to them.

    Args:
        artifact: one that takes images.
        preprocess: how the images were prepared; None is what the artifact says itself.

    Raises:
        RecipeError: it takes no images.
        ArtifactError: it takes pixels, and no preprocessing is known.
    """
    image, how = artifact.image, artifact.preprocess or preprocess
    if image.takes_pixels and how is None:
        raise no_preprocess(artifact.path)

    def feeds(images: Array) -> dict[str, Array]:
        if image.takes_pixels and how is not None:
            pixels = to_pixels(images, how)
            return {image.name: pixels if image.channels_last else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
        turned = images.transpose(0, 2, 3, 1) if image.channels_last else images
        return {image.name: np.ascontiguousarray(turned, dtype=image.type)}

    return feeds


def no_preprocess(path: Path) -> ArtifactError:
    """The error of a file that does not say how its input is preprocessed."""
    return ArtifactError(
        f"{path} does not say how its input is preprocessed: slimvit did not write it. Name --mean and --std, and "
        "--crop-pct where pictures are cropped; in a gate they are mean, std and crop_pct of [data]."
    )


def torch_call(module: nn.Module) -> Call:
    """A function from images [B, C, H, W] to the module's outputs, through torch on the CPU."""

    def call(images: Array) -> Arrays:
        with torch.no_grad():
            outputs = module(torch.from_numpy(images))
        return tuple(part.numpy() for part in outputs) if isinstance(outputs, tuple) else outputs.numpy()

    return call


def tensor_call(call: Call) -> Callable[[torch.Tensor], Any]:
    """The function with tensors in place of arrays."""

    def run(images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = call(images.numpy())
        if isinstance(outputs, tuple):
            return tuple(map(torch.from_numpy, outputs))
        return torch.from_numpy(outputs)

    return run


def stack_images(images: list[torch.Tensor]) -> Array:
    """float32 [N, C, H, W] of single images."""
    stacked: Array = np.ascontiguousarray(torch.stack(images).numpy(), dtype=np.float32)
    return stacked
