"""From pixels to what the model sees: resize, crop, channels, normalisation.

Legend: C channels, H height, W width of the model's input; N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from PIL import Image
from pydantic import BaseModel
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional

from toolchain.data.pictures import eight_bit
from toolchain.errors import DataError
from toolchain.preprocess import ImageForm
from toolchain.recipe import CropMode, Interpolation

INTERPOLATIONS: tuple[str, ...] = get_args(Interpolation)
CROP_MODES: tuple[str, ...] = get_args(CropMode)
ALWAYS = "bilinear"
"""How images are resized that are no pictures of files."""


@dataclass(frozen=True)
class Preprocessing(ImageForm):
    """How an image becomes a model input, carried out.

    Raises:
        DataError: a standard deviation is not above 0, or the filter or the crop mode is not known.
    """

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise DataError(f"data.std is {list(self.std)}; every value must be above 0")
        # timm draws a filter for each image under "random", and takes an unknown crop mode for "center".
        if self.interpolation not in INTERPOLATIONS:
            raise DataError(
                f"the interpolation is {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}. "
                "Set data.interpolation of the recipe or the gate, or --interpolation."
            )
        if self.crop_mode not in (None, *CROP_MODES):
            raise DataError(
                f"the crop mode is {self.crop_mode!r}; expected one of {', '.join(CROP_MODES)}. Set data.crop_mode of the recipe."
            )

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Model inputs float32 [N, C, H, W] of grey or C-channel pixels [N, 1 | C, h, w], uint8 or float in 0..1."""
        images = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        if images.shape[-2:] != self.input_size[1:]:
            images = functional.interpolate(images, self.input_size[1:], mode=self.interpolation, antialias=True)
        images = images.expand(-1, self.input_size[0], -1, -1)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((images - mean) / std).contiguous()

    def pixels_of(self, picture: Image.Image) -> Tensor:
        """uint8 [C, H, W] of a picture as it was opened: turned, in 8 bits, resized and cropped, and not normalised.

        Raises:
            ValueError: the scale of its pixels is not known.
        """
        grey = self.input_size[0] == 1
        pixels: Tensor = self._transform(eight_bit(picture, "L" if grey else "RGB", turn=self.exif_orientation))
        return pixels

    @cached_property
    def _transform(self) -> Any:
        return create_transform(
            self.input_size,
            interpolation=self.interpolation,
            mean=self.mean,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=False,
        )


class _Declared(BaseModel):
    """What timm's data config of a model says, of what is read here."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float | None = None
    crop_mode: str = "center"


@dataclass(frozen=True)
class Wanted:
    """What a model and a recipe require of a source.

    Attributes:
        input_size: (C, H, W) of the model.
        model_config: timm's resolved data config of the model (mean, std, interpolation, crop_pct, crop_mode).
        mean, std, crop_pct, interpolation, crop_mode: the recipe's overrides, or None.
        calibration_images: how many images calibration would like.
        exif_orientation: the recipe's, or None where the source does what is usual for its kind.
        classes: class name → number of the model's output, or None where the source numbers its own.
        workers: threads that decode, or None for as many as are worth it.
        image_column, label_column: of a table, or None where only one can be meant; no labels are read where that is "".
        mirror: whether training may mirror images, or None where the source does what is usual for its kind.
    """

    input_size: tuple[int, int, int]
    model_config: Mapping[str, object]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None
    calibration_images: int = 512
    exif_orientation: bool | None = None
    classes: Mapping[str, int] | None = None
    workers: int | None = None
    mirror: bool | None = None
    interpolation: str | None = None
    crop_mode: str | None = None
    image_column: str | None = None
    label_column: str | None = None

    def declared(self, mean: float, std: float) -> Preprocessing:
        """The preprocessing of a grey source that declares its own statistics and is never cropped.

        Raises:
            DataError: the recipe asks for a crop or another filter, or its mean or std do not fit the channels.
        """
        for name, value in (("crop_pct", self.crop_pct), ("crop_mode", self.crop_mode)):
            if value is not None:
                raise DataError(f"this source is never cropped, but data.{name} is {value}; remove it")
        if self.interpolation not in (None, ALWAYS):
            raise DataError(
                f"the images of this source are resized by {ALWAYS}, always, but data.interpolation is {self.interpolation}; remove it"
            )
        if self.exif_orientation:
            raise DataError("the images of this source have no EXIF, but data.exif_orientation is true; remove it")
        return Preprocessing(self.input_size, *self._statistics((mean,), (std,)), interpolation=ALWAYS)

    def natural(self, *, turned: bool = False) -> Preprocessing:
        """The preprocessing that the model's own data config declares, with the recipe's overrides.

        Args:
            turned: whether the source turns pictures as their EXIF orientation says where the recipe does not.

        Raises:
            DataError: mean or std do not fit the channels, or the model reads neither grey nor colour images.
        """
        channels = self.input_size[0]
        if channels not in (1, 3):
            raise DataError(f"the model reads {channels} channels; image files have 1 (grey) or 3 (RGB)")
        config = _Declared.model_validate(self.model_config)
        # timm keeps three values for a model built with in_chans = 1, and averages the weights: average these too.
        mean, std = ((sum(values) / len(values),) if channels == 1 else values for values in (config.mean, config.std))
        crop_pct = self.crop_pct if self.crop_pct is not None else config.crop_pct
        return Preprocessing(
            self.input_size,
            *self._statistics(mean, std),
            interpolation=self.interpolation or config.interpolation,
            crop_pct=1.0 if crop_pct is None else crop_pct,
            crop_mode=self.crop_mode or config.crop_mode,
            exif_orientation=turned if self.exif_orientation is None else self.exif_orientation,
        )

    def _statistics(self, mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std), C values each: the recipe's if it has them, else the given ones."""
        return (
            _per_channel("mean", self.mean if self.mean is not None else mean, self.input_size[0]),
            _per_channel("std", self.std if self.std is not None else std, self.input_size[0]),
        )


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise DataError(f"data.{name} has {len(values)} values for {channels} channels; expected 1 or {channels}")
    if not all(abs(value) <= 1 for value in values):  # nor where one is not a number
        raise DataError(
            f"{name} is {[float(value) for value in values]}; it is for pixels in 0…1 and at most 1. Divide by 255 what is for "
            "pixels in 0…255 (data.mean and data.std of a recipe or a gate, --mean and --std)."
        )
    return tuple(float(value) for value in values) * (channels if len(values) == 1 else 1)
