"""Inputs of an artifact: as declared, as fed at one batch size, and the one input that takes images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from toolchain.errors import ArtifactError, RecipeError
from toolchain.model import Preprocess
from toolchain.records import Record

Sample = tuple[int | None, ...]
"""The shape of one sample, without the batch; None where the file leaves it open."""
CHANNELS = (1, 3)
FLOATS = ("float32", "float16", "float64")
GENERATED = frozenset({*FLOATS, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))})
"""Element types for which random values can be generated."""
FIXED_SIZE = "height and width of an ONNX file are fixed at export"


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: what it is called.
        type: numpy's name of its element type; "" where it is no tensor of a known type.
        shape: batch included, a name or None where a dimension is open; None where nothing is said of it.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...] | None


class InputSpec(Record):
    """One input tensor that is fed, batch included."""

    shape: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """An artifact's input names, and what is fed to them."""

    names: tuple[str, ...]
    inputs: tuple[InputSpec, ...]

    def fits(self, other: Signature) -> bool:
        """Whether both accept the same values: equal shapes, and equal types or floats of different widths."""
        return len(self.inputs) == len(other.inputs) and all(
            ours.shape == theirs.shape
            and (ours.dtype == theirs.dtype or {np.dtype(ours.dtype).kind, np.dtype(theirs.dtype).kind} == {"f"})
            for ours, theirs in zip(self.inputs, other.inputs, strict=True)
        )


def signature_of(path: Path, ports: Sequence[Port], batch: int, sample: tuple[int, ...] | None) -> Signature:
    """The inputs of an artifact at one batch size; raises as `Artifact.signature`."""
    if not ports:
        raise ArtifactError(f"{path} has no input; there is nothing to feed")
    if sample is not None and len(ports) > 1:
        raise RecipeError(f"{path} has {len(ports)} inputs; one --input-shape cannot serve them all")
    return Signature(tuple(p.name for p in ports), tuple(_spec(path, port, batch, sample) for port in ports))


def _spec(path: Path, port: Port, batch: int, sample: tuple[int, ...] | None) -> InputSpec:
    where = f"input {port.name!r} of {path}"
    if not port.type:
        raise ArtifactError(f"{where} is no tensor of a known type")
    if port.type not in GENERATED:
        raise RecipeError(f"{where} has type {port.type}; inputs of float, integer or boolean type can be generated")
    shape = (None, *(sample or (None,))) if port.shape is None else port.shape  # of which nothing is said
    if not shape:
        raise RecipeError(f"{where} has no batch dimension; it cannot be timed at a batch")
    fixed, declared = _sizes(shape)
    if fixed not in (None, batch):
        raise RecipeError(
            f"{where} has a fixed batch of {fixed}, asked for {batch}; pass --batch {fixed} (batch of a gate's cell), or "
            "export it with a dynamic batch"
        )
    wanted = declared if sample is None else sample
    if not fit(declared, wanted):
        hint = fixed_size_hint(declared, wanted)
        raise RecipeError(f"{where} takes {shown(declared)} per sample, asked for {list(wanted)}{hint}")
    if None in wanted:
        raise RecipeError(
            f"{where} leaves its shape open, {shown(declared)} per sample; name it with --input-shape, e.g. "
            "--input-shape 3,224,224 (input_shape of a gate's cell)"
        )
    return InputSpec(shape=(batch, *(n for n in wanted if n is not None)), dtype=port.type)


def _sizes(shape: tuple[int | str | None, ...]) -> tuple[int | None, Sample]:
    """(the batch, the shape of one sample), None where they are open."""
    batch, *sample = (size if isinstance(size, int) else None for size in shape)
    return batch, tuple(sample)


@dataclass(frozen=True)
class ImageInput:
    """The one input of an artifact of images.

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
        """The shape of one image, given in this input's layout, with the channels first."""
        return (sample[-1], *sample[:-1]) if self.channels_last and len(sample) == 3 else sample


def image_input(path: Path, ports: Sequence[Port], preprocess: Preprocess | None, *, own_pixels: bool) -> ImageInput:
    """The one input that takes images. The axis of the channels follows from the shape; slimvit's own pixels are [H, W, C].

    Args:
        path: the artifact, for messages.
        ports: its inputs.
        preprocess: the preprocessing that it declares.
        own_pixels: whether it declares that it takes pixels as slimvit's own files do.

    Raises:
        RecipeError: there are several inputs, or the one is no batch of images.
        ArtifactError: there is none, or the declared preprocessing belongs to another file.
    """
    if not ports:
        raise ArtifactError(f"{path} has no input; there is nothing to feed")
    if len(ports) > 1:
        names = ", ".join(port.name for port in ports)
        raise RecipeError(
            f"{path} has {len(ports)} inputs ({names}); only files of one input, the images, are compared"
        )
    (port,) = ports
    if port.type not in (*FLOATS, "uint8"):
        kind = port.type or "of no tensor type"
        raise RecipeError(
            f"input {port.name!r} of {path} is {kind}; images are given as {', '.join(FLOATS)} or as uint8 pixels"
        )
    batch, sample = _sizes(port.shape or (None,))
    if not sample:
        raise RecipeError(f"input {port.name!r} of {path} says no shape [batch, …]; it takes no batch of images")
    own = own_pixels and preprocess is not None and sample[-1] == preprocess.input_size[0]
    last = len(sample) == 3 and (
        (port.type == "uint8" and own) or (sample[2] in CHANNELS and sample[0] not in CHANNELS)
    )
    image = ImageInput(port.name, port.type, batch, sample, last)
    if preprocess and len(image.size) == 3 and not fit(preprocess.input_size[:1], image.size[:1]):
        raise ArtifactError(
            f"{path} says that images are {list(preprocess.input_size)}, channels first, and takes {shown(image.sample)}: its "
            "metadata is of another file. Remove its slimvit.preprocess and name --mean and --std."
        )
    return image


def resolved(inputs: Mapping[Path, ImageInput], input_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The one shape of a sample that all artifacts take, channels first.

    Args:
        inputs: artifact → what it takes.
        input_shape: the requested shape, in the layout of each artifact; None takes it from the artifacts.

    Raises:
        RecipeError: their shapes differ from each other or from `input_shape`, or all leave the shape open.
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
