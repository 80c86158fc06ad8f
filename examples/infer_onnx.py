"""Classifies pictures with an ONNX file that slimvit wrote. Needs numpy, onnxruntime and pillow; neither torch nor timm.

    python infer_onnx.py model.onnx picture.png [more pictures] [--labels labels.txt] [--top 5]

How a picture becomes the model's input is read from the file's own metadata: size, resize filter, crop, mean and std.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from PIL import Image

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


def resized(picture: Image.Image, how: dict) -> Image.Image:
    """The picture at the model's size: scaled so that a centre crop keeps `crop_pct` of it, or without a crop squashed."""
    _, height, width = how["input_size"]
    resample, crop_pct, mode = FILTERS[how["interpolation"]], how["crop_pct"], how["crop_mode"]
    if crop_pct is None:
        return picture if picture.size == (width, height) else picture.resize((width, height), resample)
    tall, wide = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if mode == "squash":
        picture = picture.resize((wide, tall), resample)
    elif mode in ("center", None) and tall == wide:  # the shorter edge becomes as long as the square's
        short = min(picture.size)
        size = tuple(tall if edge == short else int(tall * edge / short) for edge in picture.size)
        picture = picture.resize(size, resample)
    else:
        sys.exit(f"crop mode {mode!r} of a {height}×{width} input is not in this example")
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def model_input(path: Path, how: dict, *, pixels_in: bool) -> np.ndarray:
    """uint8 [1, H, W, C] for a file that does the rest itself, else float32 [1, C, H, W]."""
    with Image.open(path) as picture:
        pixels = np.asarray(resized(picture.convert("L" if how["input_size"][0] == 1 else "RGB"), how))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels_in:
        return pixels[None]
    mean, std = (np.array(how[name], np.float32) for name in ("mean", "std"))
    return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]


def main() -> None:
    """Prints the most likely classes of each picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--labels", type=Path, help="a text file with one class a line")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args()

    session = ort.InferenceSession(asked.model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    if "slimvit.preprocess" not in metadata:
        sys.exit(f"{asked.model} does not say how its input is prepared: slimvit did not write it")
    how = json.loads(metadata["slimvit.preprocess"])
    pixels_in = session.get_inputs()[0].type == "tensor(uint8)"
    names = asked.labels.read_text(encoding="utf-8").splitlines() if asked.labels else None

    found = {}
    for path in asked.pictures:
        logits = session.run(["logits"], {"image": model_input(path, how, pixels_in=pixels_in)})[0][0].astype(
            np.float64
        )
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[: asked.top]
        found[str(path)] = [
            {"class": int(index), "label": names[index] if names else str(index), "probability": float(shares[index])}
            for index in best
        ]
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    for name, rows in found.items():
        print(name)
        for row in rows:
            print(f"  {row['probability']:7.2%}  {row['label']}")


if __name__ == "__main__":
    main()
