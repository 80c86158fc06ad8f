"""Runs an ONNX file that slimvit wrote on pictures. Needs numpy, onnxruntime and pillow; neither torch nor timm.

    python infer_onnx.py model.onnx picture.png [more pictures] [--labels labels.txt] [--top 5]

A classifier's largest outputs are printed with their classes. Of a model without one, the features of each picture: with
--features FILE they are written to a .npz file, and the pictures are compared with the first by cosine.

How a picture becomes the model's input is read from the file's own metadata: size, resize filter, crop, mean and std, and
whether its EXIF orientation counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

EIGHT_BIT = ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LA", "La", "PA")
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLES = 258, 262, 339


def eight_bit(picture: Image.Image, mode: str, *, turn: bool) -> Image.Image:
    """The picture in "L" or "RGB"; more than 8 bits are scaled by their range, floats by 1. Transparency is left out.

    Raises ValueError where the scale of the pixels is not known.
    """
    most = largest(picture)
    if turn:
        picture = ImageOps.exif_transpose(picture)
    if most is not None:
        values = np.asarray(picture).astype(np.float64)
        if not (values.min() >= 0 and values.max() <= most):
            raise ValueError(f"its pixels are floats from {values.min():g} to {values.max():g}; expected 0 to 1")
        scaled = values * 255 if most == 1 else (values * 255 + most // 2) // most
        picture = Image.fromarray(scaled.round().astype(np.uint8))
    elif picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode.upper())
    elif picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # Pillow warns of the direct way, which gives the same colours
    return picture.convert(mode)


def largest(picture: Image.Image) -> int | None:
    """What stands for white in a picture of more than 8 bits a channel, or None if it has 8."""
    mode, tags = picture.mode, getattr(picture, "tag_v2", {})
    signed = 2 in np.atleast_1d(tags.get(TIFF_SAMPLES, 1))
    if mode in EIGHT_BIT and not signed:
        return None
    if not signed and tags.get(TIFF_PHOTOMETRIC, 1) != 0:  # 0: of more than 8 bits, Pillow does not invert it
        if mode == "F":
            return 1
        if mode.startswith("I;16"):
            return 2 ** int(np.atleast_1d(tags.get(TIFF_BITS, 16))[0]) - 1
        if mode == "I" and picture.format in ("PNG", "PPM"):
            return 2**16 - 1
    raise ValueError(f"the range of its pixels is not known (mode {mode})")


def resized(picture: Image.Image, how: dict) -> Image.Image:
    """The picture at the model's size, by timm's evaluation transform.

    "center" scales it so that a centre crop keeps `crop_pct` of it, "squash" does so without regard to its shape, and
    "border" scales its longest edge and fills the rest with the mean.
    """
    channels, height, width = how["input_size"]
    resample, crop_pct, mode = Image.Resampling[how["interpolation"].upper()], how["crop_pct"], how["crop_mode"]
    if crop_pct is None:
        return picture if picture.size == (width, height) else picture.resize((width, height), resample)
    tall, wide = math.floor(height / crop_pct), math.floor(width / crop_pct)
    fill: tuple[int, ...] = (0,) * channels
    ratios = picture.height / tall, picture.width / wide
    if mode == "squash":
        size = (wide, tall)
    elif mode == "border":
        size = (round(picture.width / max(ratios)), round(picture.height / max(ratios)))
        fill = tuple(round(255 * value) for value in how["mean"])
    elif mode not in ("center", None):
        sys.exit(f"crop mode {mode!r} is not in this example")
    elif tall == wide:
        short = min(picture.size)
        size = (
            tall if picture.width == short else int(tall * picture.width / short),
            tall if picture.height == short else int(tall * picture.height / short),
        )
    else:
        size = (round(picture.width / min(ratios)), round(picture.height / min(ratios)))
    return cropped(picture.resize(size, resample), width, height, fill)


def cropped(picture: Image.Image, width: int, height: int, fill: tuple[int, ...]) -> Image.Image:
    """The middle of a picture; what is too small is first filled up, the odd pixel on the right and at the bottom."""
    across, down = max(width - picture.width, 0), max(height - picture.height, 0)
    if across or down:
        whole = Image.new(
            picture.mode, (picture.width + across, picture.height + down), fill if len(fill) > 1 else fill[0]
        )
        whole.paste(picture, (across // 2, down // 2))
        picture = whole
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def model_input(path: Path, how: dict, *, pixels_in: bool) -> np.ndarray:
    """uint8 [1, H, W, C] for a file that does the rest itself, else float32 [1, C, H, W]."""
    try:
        with Image.open(path) as opened:
            mode = "L" if how["input_size"][0] == 1 else "RGB"
            picture = eight_bit(opened, mode, turn=how.get("exif_orientation", False))
    except (OSError, SyntaxError, ValueError, KeyError, struct.error, Image.DecompressionBombError) as error:
        sys.exit(f"cannot read {path}: {error}")
    pixels = np.asarray(resized(picture, how))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels_in:
        return pixels[None]
    mean, std = (np.array(how[name], np.float32) for name in ("mean", "std"))
    return ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]


def read_out(values: np.ndarray, kind: str, top: int) -> list[tuple[int, dict]]:
    """(output, what it says) of the outputs [K], the largest first: a share of all classes, of yes, or the number itself."""
    if kind == "regression":
        return [(index, {"value": float(value)}) for index, value in enumerate(values)]
    shares = 1 / (1 + np.exp(-values)) if kind == "multi-label" else np.exp(values - values.max())
    if kind == "logits":
        shares /= shares.sum()
    return [(int(index), {"probability": float(shares[index])}) for index in np.argsort(-shares)[:top]]


def one_vector(output: np.ndarray) -> np.ndarray:
    """[D], what stands for a picture of its output: features [1, D] as they are, of tokens [1, ..., D] the mean."""
    return output[0].reshape(-1, output.shape[-1]).mean(axis=0, dtype=np.float64)


def print_features(features: dict[str, dict[str, np.ndarray]], file: Path | None, *, as_json: bool) -> None:
    """What a model without a classifier gives for each picture, and how alike the pictures are to the first."""
    vectors = [one_vector([*outputs.values()][-1]) for outputs in features.values()]
    vectors = [vector / np.linalg.norm(vector) for vector in vectors]
    rows = {
        path: {
            "shapes": {name: list(values.shape[1:]) for name, values in outputs.items()},
            "cosine": float(vector @ vectors[0]),
        }
        for (path, outputs), vector in zip(features.items(), vectors, strict=True)
    }
    if file is not None:
        names = [*next(iter(features.values()))]
        stacked = {name: np.concatenate([outputs[name] for outputs in features.values()]) for name in names}
        np.savez(file, pictures=np.array([*features]), **stacked)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for path, row in rows.items():
        shapes = ", ".join(f"{name} {shape}" for name, shape in row["shapes"].items())
        print(f"{path}  {shapes}  cosine with the first {row['cosine']:.4f}")


def main() -> None:
    """Prints the most likely classes of each picture, the numbers that the model gives for it, or what is known of its features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--labels", type=Path, help="a text file with one class a line, in place of those in the file")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print")
    parser.add_argument("--features", type=Path, help="a .npz file for the features of a model without a classifier")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    asked = parser.parse_args()

    session = ort.InferenceSession(asked.model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    if "slimvit.preprocess" not in metadata:
        sys.exit(f"{asked.model} does not say how its input is prepared: slimvit did not write it")
    how = json.loads(metadata["slimvit.preprocess"])
    pixels_in = session.get_inputs()[0].type == "tensor(uint8)"
    kind = metadata.get("slimvit.output", "logits" if session.get_outputs()[0].shape[-1] > 1 else "regression")
    if kind in ("features", "tokens", "layers"):
        if asked.labels:
            sys.exit(f"{asked.model} gives {kind}, which have no classes: leave --labels out")
        outputs = [each.name for each in session.get_outputs()]
        features = {}
        for path in asked.pictures:
            values = session.run(outputs, {"image": model_input(path, how, pixels_in=pixels_in)})
            features[str(path)] = dict(zip(outputs, values, strict=True))
        print_features(features, asked.features, as_json=asked.json)
        return
    if asked.features:
        sys.exit(f"{asked.model} has a classifier and gives no features: leave --features out")
    names = json.loads(metadata.get("slimvit.classes", "[]"))
    if asked.labels:
        names = asked.labels.read_text(encoding="utf-8").splitlines()

    found = {}
    for path in asked.pictures:
        logits = session.run(["logits"], {"image": model_input(path, how, pixels_in=pixels_in)})[0][0].astype(
            np.float64
        )
        found[str(path)] = [
            {"class": index, "label": names[index] if names else str(index), **said}
            for index, said in read_out(logits, kind, asked.top)
        ]
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    for name, rows in found.items():
        print(name)
        for row in rows:
            print(
                f"  {row['value']:9.4g}  {row['label']}"
                if "value" in row
                else f"  {row['probability']:7.2%}  {row['label']}"
            )


if __name__ == "__main__":
    main()
