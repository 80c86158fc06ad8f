"""preprocessor_config.json → how timm prepares the same pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError

PROCESSORS = (("preprocessor_config.json", ""), ("processor_config.json", "image_processor"))
"""(file, key) under which a folder may describe it, the usual first."""
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Number of a filter in Pillow → its name in timm."""
WHOLE = {"crop_pct": 1.0, "crop_mode": "squash"}
"""Fields for a picture that is resized to the model's size, ignoring its aspect ratio, and not cropped."""


@dataclass(frozen=True)
class Defaults:
    """What a class of image processors does where its file is silent.

    Attributes:
        interpolation: its filter.
        by_edge: whether a size of one number is that of the shorter edge, and not of both.
        crop_pct: where a size is that of the crop, the share that this is of the picture; None where it is the picture's.
    """

    interpolation: str
    by_edge: bool = False
    crop_pct: float | None = None


CLASSES = {
    "ViT": Defaults("bilinear"),
    "DeiT": Defaults("bicubic"),
    "Beit": Defaults("bicubic"),
    "Bit": Defaults("bicubic", by_edge=True),
    "CLIP": Defaults("bicubic", by_edge=True),
    "ConvNext": Defaults("bicubic", by_edge=True, crop_pct=224 / 256),
    "DINOv3ViT": Defaults("bilinear"),
    "Siglip": Defaults("bicubic", by_edge=True),
    "Siglip2": Defaults("bilinear"),
}
"""What stands before "ImageProcessor" or, in older files, "FeatureExtractor" → what that class does."""

WHOLE_FROM = 384
"""From this size on, a processor whose size is that of the crop crops nothing."""


@dataclass(frozen=True)
class Preparation:
    """How pictures become the model's input.

    Attributes:
        fields: mean, std, interpolation, crop_pct and crop_mode of timm's pretrained_cfg; the first two only if they are said.
        crop: (height, width) of the images that it makes; None where nothing says it.
        silent: what no file says of "mean and std", "the filter", "the size".
    """

    fields: Mapping[str, Any]
    crop: tuple[int, int] | None = None
    silent: tuple[str, ...] = ()


def preparation(folder: Path, usual: str) -> Preparation:
    """How a folder prepares pictures.

    Args:
        folder: with or without a processor's file.
        usual: the key of `CLASSES` where a file names none of them.

    Raises:
        ModelError: the file is not one of an image processor.
    """
    for name, key in PROCESSORS:
        if not (folder / name).is_file():
            continue
        try:
            raw = json.loads((folder / name).read_text(encoding="utf-8"))
            raw = raw.get(key) if key else raw
            if raw is not None:
                return _preparation(raw, usual)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
            raise ModelError(
                f"{folder / name} does not describe an image processor: {error}. Mend or remove it."
            ) from None
    return _preparation({}, usual)


def _preparation(raw: Mapping[str, Any], usual: str) -> Preparation:
    kind = str(raw.get("image_processor_type") or raw.get("feature_extractor_type") or "")
    defaults = CLASSES.get(re.split("ImageProcessor|FeatureExtractor", kind)[0], CLASSES[usual])
    number, silent = raw.get("resample"), []
    fields: dict[str, Any] = {"interpolation": defaults.interpolation if number is None else FILTERS[number], **WHOLE}
    scale = 255 * (raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1)
    mean, std = raw.get("image_mean"), raw.get("image_std")
    if not raw.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None:
        silent.append("mean and std")
    else:  # of pixels times `scale`; timm's are of pixels in 0…1
        fields |= {"mean": tuple(float(m) / scale for m in mean), "std": tuple(float(s) / scale for s in std)}
    silent += ["the filter"] if number is None else []
    crop = _edges(raw.get("crop_size")) if raw.get("do_center_crop") else None
    size = raw.get("size") if raw.get("do_resize", True) else None
    if size is None:
        return Preparation(fields, crop, (*silent, "the size"))
    edges, square = _resized(size, defaults)
    if defaults.crop_pct is not None:
        crop, square = edges, min(edges) >= WHOLE_FROM
        edges = edges if square else (int(edges[0] / raw.get("crop_pct", defaults.crop_pct)),) * 2
    fields["crop_pct"] = min(1.0, crop[0] / edges[0]) if crop else 1.0
    fields["crop_mode"] = "squash" if square else "center"
    return Preparation(fields, crop or (edges if square else None), tuple(silent))


def _resized(size: Any, defaults: Defaults) -> tuple[tuple[int, int], bool]:
    """((height, width) or the shorter edge twice that a picture is resized to, whether both of its edges are)."""
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return (int(size["shortest_edge"]),) * 2, False
    edges = _edges(size)
    if edges is None:
        raise ValueError(f"its size is {size!r}")
    return edges, isinstance(size, Mapping) or not defaults.by_edge


def _edges(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size that may be one number for both."""
    if not size:
        return None
    return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else (int(size),) * 2
