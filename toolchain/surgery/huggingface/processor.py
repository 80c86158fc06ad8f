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
        crops: whether it crops.
        crop_pct: where a size is that of the crop, the share that this is of the picture; None where it is the picture's.
    """

    interpolation: str
    by_edge: bool = False
    crops: bool = False
    crop_pct: float | None = None


CLASSES = {
    "ViT": Defaults("bilinear"),
    "DeiT": Defaults("bicubic", crops=True),
    "Beit": Defaults("bicubic"),
    "Bit": Defaults("bicubic", by_edge=True, crops=True),
    "CLIP": Defaults("bicubic", by_edge=True, crops=True),
    "ConvNext": Defaults("bicubic", by_edge=True, crop_pct=224 / 256),
    "DINOv3ViT": Defaults("bilinear"),
    "Siglip": Defaults("bicubic", by_edge=True),
    "Siglip2": Defaults("bilinear"),
}
"""What stands before "ImageProcessor" or, in older files, "FeatureExtractor" → what that class does."""

CROP_SIZE = 224
"""Height and width of what a class that crops cuts out where its file does not say it."""
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
                f"{folder / name} does not describe an image processor that can be followed: {error}. Mend it, or remove it and say "
                "how pictures are prepared with mean, std, interpolation, crop_pct and crop_mode of [data]."
            ) from None
    return _preparation({}, usual)


def _preparation(raw: Mapping[str, Any], usual: str) -> Preparation:
    said = {
        key: value for key, value in raw.items() if value is not None
    }  # a class's default counts where it says null
    defaults = _defaults(said, usual)
    number, silent = said.get("resample"), []
    fields: dict[str, Any] = {"interpolation": defaults.interpolation if number is None else FILTERS[number], **WHOLE}
    scale = 255 * (said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1)
    mean, std = said.get("image_mean"), said.get("image_std")
    if not said.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is None or std is None:
        silent.append("mean and std")
    else:  # of pixels times `scale`; timm's are of pixels in 0…1
        fields |= {"mean": tuple(float(m) / scale for m in mean), "std": tuple(float(s) / scale for s in std)}
    silent += ["the filter"] if number is None else []
    size = said.get("size") if said.get("do_resize", True) else None
    crop_size = said.get("crop_size", CROP_SIZE if size else None)
    crop = _edges(crop_size) if said.get("do_center_crop", defaults.crops) else None
    if size is None:
        return Preparation(fields, crop, (*silent, "the size"))
    edges, square = _resized(size, defaults)
    if defaults.crop_pct is not None:
        crop, square = edges, min(edges) >= WHOLE_FROM
        edges = edges if square else (int(edges[0] / said.get("crop_pct", defaults.crop_pct)),) * 2
    if crop:
        _require_within(crop, edges, square=square)
    fields["crop_pct"] = crop[0] / edges[0] if crop else 1.0
    fields["crop_mode"] = "squash" if square else "center"
    return Preparation(fields, crop or (edges if square else None), tuple(silent))


def _defaults(said: Mapping[str, Any], usual: str) -> Defaults:
    """What the class of a file does where the file is silent; raises ValueError for a class that is not known."""
    kind = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "")
    name = re.split("ImageProcessor|FeatureExtractor", kind)[0] or usual
    if name not in CLASSES:
        raise ValueError(
            f"it is that of a {kind}, and what that does with pictures is not known here; known are {', '.join(CLASSES)}. Where one "
            "of these does the same, name it as image_processor_type"
        )
    return CLASSES[name]


def _require_within(crop: tuple[int, int], edges: tuple[int, int], *, square: bool) -> None:
    """Raises ValueError unless timm crops the same of a picture: a share of both edges.

    Args:
        crop: (height, width) that is cut out.
        edges: (height, width) that the picture is resized to, or its shorter edge twice.
        square: whether both edges of the picture are resized to these.
    """
    if crop[0] > edges[0] or crop[1] > edges[1]:
        raise ValueError(
            f"it crops {crop[0]}×{crop[1]} out of pictures of {edges[0]}×{edges[1]}, whose rest would be padding"
        )
    if crop[0] * edges[1] != crop[1] * edges[0]:
        whole = "×".join(map(str, edges)) if square else f"a shorter edge of {edges[0]}"
        raise ValueError(f"it crops {crop[0]}×{crop[1]} out of pictures of {whole}: other shares of height and width")


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
