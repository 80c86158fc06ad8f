"""Classifies pictures by a .tflite file that slimvit wrote. Needs ai-edge-litert, numpy and pillow alone.

    python infer_litert.py model.tflite picture.png [more pictures] [--top 5]
How a picture becomes the input is read from the file's own metadata. For square models and pictures of 8 bits a channel.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.schema_py_generated import Model
from PIL import Image, ImageOps


def metadata(path: Path) -> dict:
    """What slimvit says of a file, in it."""
    model = Model.GetRootAs(path.read_bytes(), 0)
    entries = {entry.Name(): entry.Buffer() for entry in map(model.Metadata, range(model.MetadataLength()))}
    return json.loads(model.Buffers(entries[b"slimvit"]).DataAsNumpy().tobytes())


def pixels(path: Path, how: dict) -> np.ndarray:
    """uint8 [H, W, C], by timm's evaluation transform: the short edge is scaled and the middle taken, or all is scaled."""
    (channels, height, width), resample = how["input_size"], Image.Resampling[how["interpolation"].upper()]
    picture = ImageOps.exif_transpose(Image.open(path)) if how.get("exif_orientation") else Image.open(path)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if how["crop_pct"] is None:
        return np.asarray(picture.resize((width, height), resample)).reshape(height, width, channels)
    if height != width or how["crop_mode"] not in ("center", None):
        raise SystemExit(f"crop mode {how['crop_mode']!r} at {height} x {width} is not in this example")
    edge, short = int(height / how["crop_pct"]), min(picture.size)
    picture = picture.resize([edge * side // short for side in picture.size], resample)
    left, top = (round((side - height) / 2) for side in picture.size)
    return np.asarray(picture.crop((left, top, left + width, top + height))).reshape(height, width, channels)


def main() -> None:
    """Prints the most likely classes of each picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print")
    asked = parser.parse_args()
    told, run = metadata(asked.model), Interpreter(str(asked.model)).get_signature_runner("b1")
    if (kind := told.get("output", "logits")) not in ("logits", "multi-label"):
        raise SystemExit(f"{asked.model} gives {kind}, which have no classes")
    for path in asked.pictures:
        image = pixels(path, told["preprocess"])[None]
        if "input" not in told:  # else the file takes pixels and does the rest itself
            mean, std = (np.array(told["preprocess"][name], np.float32) for name in ("mean", "std"))
            image = np.ascontiguousarray(((image.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))
        logits = run(image=image)["logits"][0].astype(np.float64)
        shares = 1 / (1 + np.exp(-logits)) if kind == "multi-label" else np.exp(logits) / np.exp(logits).sum()
        print(path, *(f"{index}: {shares[index]:.2%}" for index in np.argsort(-shares)[: asked.top]), sep="  ")


if __name__ == "__main__":
    main()
