"""What a file takes: its one input's name, type and shape, images as that input, and what it says of their preprocessing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export.onnx_graph import (
    INPUT,
)
from toolchain.export.pixels import FORM, UINT8, to_pixels
from toolchain.model import Preprocess

Array = NDArray[Any]
PREPROCESS = "slimvit.preprocess"
"""The key of a file's metadata that says how images become its input."""
Sample = tuple[int | None, ...]
"""The shape of one sample, without the batch; None where the file leaves it open."""
CHANNELS = (1, 3)
FLOATS = ("float32", "float16", "float64")
FIXED_SIZE = "height and width of an ONNX file are fixed at export"


@dataclass(frozen=True)
class ImageInput:
    """The one input of an artifact.

    Attributes:
        name: what it is called.
        type: its element type: one of `FLOATS`, or uint8 for pixels 0…255.
        batch: the number of images that it takes, where that is fixed; else None.
        sample: the shape of one image as the file has it.
        channels_last: whether that is [H, W, C] rather than [C, H, W].
    """

    name: str
    type: str
    batch: int | None
    sample: Sample
    channels_last: bool = False

    @property
    def takes_pixels(self) -> bool:
        """Whether it is uint8."""
        return self.type == "uint8"

    @property
    def size(self) -> Sample:
        """The shape of one image, channels first: (C, H, W), or of another rank what the file has."""
        return self.turned(self.sample)

    def turned(self, sample: Sample) -> Sample:
        """A shape of one image in this input's own layout, with the channels first."""
        return (sample[-1], *sample[:-1]) if self.channels_last and len(sample) == 3 else sample

    def feeds(self, images: Array, preprocess: Preprocess | None = None) -> dict[str, Array]:
        """Images [B, C, H, W], float32, as this input takes them.

        Args:
            images: preprocessed.
            preprocess: how; needed where the input takes pixels, which are those closest to the images.
        """
        if self.takes_pixels:
            assert preprocess is not None
            pixels = to_pixels(images, preprocess)
            return {self.name: pixels if self.channels_last else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
        turned = images.transpose(0, 2, 3, 1) if self.channels_last else images
        return {self.name: np.ascontiguousarray(turned, dtype=self.type)}


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
        raise no_preprocess(path)
    return preprocess


def no_preprocess(path: Path) -> ArtifactError:
    """The error of a file that does not say how its input is preprocessed."""
    return ArtifactError(
        f"{path} does not say how its input is preprocessed: slimvit did not write it. Name --mean and --std, and "
        "--crop-pct where pictures are cropped; in a gate they are mean, std and crop_pct of [data]."
    )


def declared_preprocess(model: onnx.ModelProto, path: Path) -> Preprocess | None:
    """What a file says about its input, None if nothing; raises ArtifactError if it is damaged."""
    for entry in model.metadata_props:
        if entry.key == PREPROCESS:
            try:
                return Preprocess.from_dict(json.loads(entry.value))
            except (json.JSONDecodeError, ArtifactError) as error:
                raise ArtifactError(f"{path} has damaged metadata: {PREPROCESS}: {error}") from None
    return None


def folder_input(preprocess: Preprocess) -> ImageInput:
    """What a model folder takes."""
    return ImageInput(INPUT, "float32", None, preprocess.input_size)


def input_of(model: onnx.ModelProto, path: Path) -> ImageInput:
    """What an ONNX file takes. Where the channels are follows from the shape, and of slimvit's own pixels is known.

    Args:
        model: the file, read.
        path: where it lies, for messages.

    Raises:
        RecipeError: it has several inputs, or one that is no batch of images.
        ArtifactError: it has none.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in weights]
    if not values:
        raise ArtifactError(f"{path} has no input; there is nothing to feed")
    if len(values) > 1:
        names = ", ".join(value.name for value in values)
        raise RecipeError(
            f"{path} has {len(values)} inputs ({names}); only files of one input, the images, are compared"
        )
    tensor = values[0].type.tensor_type
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        kind = "of no tensor type"
    if kind not in (*FLOATS, "uint8"):
        raise RecipeError(
            f"input {values[0].name!r} of {path} is {kind}; images are given as {', '.join(FLOATS)} or as uint8 pixels"
        )
    dims: list[int | None] = [dim.dim_value or None for dim in tensor.shape.dim]
    batch, *sample = dims or [None]
    if not sample:
        raise RecipeError(f"input {values[0].name!r} of {path} says no shape [batch, …]; it takes no batch of images")
    declared = declared_preprocess(model, path)
    form = next((entry.value for entry in model.metadata_props if entry.key == FORM), "")
    own = form == UINT8 and declared is not None and sample[-1] == declared.input_size[0]
    last = len(sample) == 3 and ((kind == "uint8" and own) or (sample[2] in CHANNELS and sample[0] not in CHANNELS))
    return ImageInput(values[0].name, kind, batch, tuple(sample), last)


def resolved(inputs: dict[Path, ImageInput], input_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The one shape of a sample that all artifacts take, channels first.

    Args:
        inputs: artifact → what it takes.
        input_shape: what was asked for, in the layout of each; None takes it from the artifacts.

    Raises:
        RecipeError: they take other shapes than each other or than what was asked for, or all leave it open.
    """
    size: Sample | None = None
    for path, each in inputs.items():
        if input_shape is not None and not fit(each.sample, input_shape):
            hint = fixed_size_hint(each.sample, input_shape)
            raise RecipeError(f"{path} takes {shown(each.sample)} per image, asked for {list(input_shape)}{hint}")
        own = each.size if input_shape is None else each.turned(input_shape)
        if size is not None and not fit(size, own):
            hint = fixed_size_hint(own, size)
            raise RecipeError(
                f"{path} takes {shown(own)} per image, {next(iter(inputs))} takes {shown(size)}, channels first{hint}"
            )
        size = own if size is None else tuple(a or b for a, b in zip(size, own, strict=True))
    assert size is not None
    if None in size:
        raise RecipeError(
            f"{' and '.join(map(str, inputs))} leave the shape of an image open, {shown(size)}; name it with "
            "--input-shape, e.g. --input-shape 3,224,224"
        )
    return tuple(n for n in size if n is not None)


def fit(a: Sample, b: Sample) -> bool:
    """Whether one shape can be both; None fits anything."""
    return len(a) == len(b) and all(None in pair or pair[0] == pair[1] for pair in zip(a, b, strict=True))


def fixed_size_hint(a: Sample, b: Sample) -> str:
    """The end of a sentence about two shapes that do not fit: "; …" where they are images of as many channels, else ""."""
    images = len(a) == len(b) == 3 and None not in a
    return f"; {FIXED_SIZE}" if images and (a[0] == b[0] or a[2] == b[2]) else ""


def shown(sample: Sample) -> str:
    """A shape for a message: [3, ?, ?] where the file leaves height and width open."""
    return f"[{', '.join('?' if n is None else str(n) for n in sample)}]"
