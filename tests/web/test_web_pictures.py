"""examples/web/picture.mjs: a page sees in a picture what Pillow and timm see."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolchain.data.transforms import CROP_MODES, INTERPOLATIONS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="there is no program node")
SIZES = [(61, 97), (120, 50), (40, 40), (33, 32), (9, 200), (5, 7)]


@pytest.fixture(scope="module")
def infer_onnx():
    """The Python example as a module."""
    spec = importlib.util.spec_from_file_location("infer_onnx", EXAMPLES / "infer_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_first(picture, size, resample, resize=Image.Image.resize):
    return resize(resize(picture, (size[0], picture.height), resample), size, resample)


def prepared(cases):
    """What the page makes of [(how, picture, whether it is for a file that takes pixels)]."""
    command = ["node", str(Path(__file__).with_name("prepare.mjs")), str(EXAMPLES / "web" / "picture.mjs")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("crop_mode", [*CROP_MODES, None])
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 24, 40), (1, 16, 30)], ids=str)
def test_a_page_prepares_pictures_as_the_python_example_does(infer_onnx, tmp_path, monkeypatch, crop_mode, input_size):
    """Kind: a filter, crop or rounding of the browser's own.

    Newer versions of Pillow begin with the columns where that is cheaper, and round in between: here it is told to begin
    with the rows, as the page and older ones do. Exact then, but for what float32 rounds.
    """
    monkeypatch.setattr(Image.Image, "resize", rows_first)
    grey = input_size[0] == 1
    mean, std = ((0.3,), (0.35,)) if grey else ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for width, height in SIZES:
        file, stored = tmp_path / f"{width}x{height}.png", tmp_path / f"{width}x{height}.rgba"
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(file)
        stored.write_bytes(picture.convert("RGBA").tobytes())
        shown = {"file": str(stored), "width": width, "height": height}
        crops = (None,) if crop_mode is None else (0.875, 1.0, 1.15)
        for interpolation, crop_pct in itertools.product(INTERPOLATIONS, crops):
            how = {"input_size": input_size, "mean": mean, "std": std, "crop_pct": crop_pct}
            how |= {"interpolation": interpolation, "crop_mode": crop_mode}
            pixels_in = crop_pct == 1.0
            cases.append({"how": how, "picture": shown, "pixelsIn": pixels_in})
            expected.append(infer_onnx.model_input(file, how, pixels_in=pixels_in))
    for case, ours, theirs in zip(cases, prepared(cases), expected, strict=True):
        np.testing.assert_allclose(np.array(ours).reshape(theirs.shape), theirs, atol=1e-6, err_msg=str(case))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_one_axis_is_resized_as_by_pillow_number_for_number(tmp_path, interpolation):
    rng = np.random.default_rng(0)
    cases, expected = [], []
    for (width, height), (wide, tall) in itertools.product(SIZES, [(30, None), (None, 45), (170, None), (None, 16)]):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        stored = tmp_path / f"{len(cases)}.rgba"
        stored.write_bytes(picture.convert("RGBA").tobytes())
        size = wide or width, tall or height
        how = {"input_size": (3, size[1], size[0]), "crop_pct": None, "interpolation": interpolation}
        cases.append({"how": how, "picture": {"file": str(stored), "width": width, "height": height}, "pixelsIn": True})
        expected.append(np.asarray(picture.resize(size, Image.Resampling[interpolation.upper()])))
    for case, ours, theirs in zip(cases, prepared(cases), expected, strict=True):
        np.testing.assert_array_equal(np.array(ours).reshape(theirs.shape), theirs, err_msg=str(case))
