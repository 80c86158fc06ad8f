"""How an image becomes the input of a model, in the fields that data sources, models and artifacts share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageForm:
    """The form in which a model takes an image.

    Attributes:
        input_size: (C, H, W).
        mean, std: C values each, for pixels in 0…1.
        interpolation: timm's name of the filter by which an image of another size is resized (antialiased).
        crop_pct: the share of the resized image that the centre crop keeps; None for no crop.
        crop_mode: timm's crop mode ("center", "squash", "border"); None for no crop.
        exif_orientation: whether a picture is turned first as its EXIF orientation says.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float | None = None
    crop_mode: str | None = None
    exif_orientation: bool = False
