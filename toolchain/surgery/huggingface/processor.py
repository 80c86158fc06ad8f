"""preprocessor_config.json → how timm prepares the same pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError

PROCESSORS = (("preprocessor_config.json", ""), ("processor_config.json", "image_processor"))
"""(file, key) under which a folder may describe it, the usual first."""
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Number of a filter in Pillow → its name in timm."""
BY_EDGE = ("CLIP", "ConvNext", "Bit")
"""Processors that take a size of one number for the shorter edge, and not for both."""


def preprocessing(folder: Path) -> dict[str, Any] | None:
    """What timm's pretrained_cfg says of a processor: mean, std, interpolation, crop; None if the folder describes none.

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
                return _fields(raw)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise ModelError(
                f"{folder / name} does not describe an image processor: {error}. Mend or remove it."
            ) from None
    return None


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"interpolation": FILTERS[raw.get("resample", 2)]}
    scale = 255 * (raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1)
    mean, std = raw.get("image_mean"), raw.get("image_std")
    if not raw.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if mean is not None and std is not None:  # of pixels times `scale`; timm's are of pixels in 0…1
        fields |= {"mean": tuple(float(m) / scale for m in mean), "std": tuple(float(s) / scale for s in std)}
    crop = _edge(raw.get("crop_size")) if raw.get("do_center_crop") else None
    size, square = _size(raw)
    if size is None:
        return fields
    return fields | {
        "crop_pct": min(1.0, crop / size) if crop else 1.0,
        "crop_mode": "squash" if square else "center",
        "crop": crop or (size if square else None),
    }


def _size(raw: Mapping[str, Any]) -> tuple[int | None, bool]:
    """(edge that a picture is resized to, whether both of its edges are)."""
    size = raw.get("size")
    if size is None or not raw.get("do_resize", True):
        return None, False
    if isinstance(size, Mapping):
        return (int(size["shortest_edge"]), False) if "shortest_edge" in size else (int(size["height"]), True)
    kind = str(raw.get("image_processor_type") or raw.get("feature_extractor_type") or "")
    return int(size), not kind.startswith(BY_EDGE)


def _edge(size: Any) -> int | None:
    return int(size["height"] if isinstance(size, Mapping) else size) if size else None
