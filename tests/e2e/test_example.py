"""examples/infer_onnx.py on files of slimvit: the classes that the model itself gives, without torch and timm."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import dense_model
from PIL import Image

from toolchain.artifact import Preprocess, TimmModel
from toolchain.data.transforms import Preprocessing
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.pixels import with_pixels
from toolchain.export.stage import onnx_metadata

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "infer_onnx.py"
# torch and timm cannot be imported: the script is run as on a machine that has neither.
WITHOUT = "import runpy, sys; sys.modules.update(torch=None, timm=None, torchvision=None, toolchain=None); "
RUN = WITHOUT + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
WAYS = {
    "centre crop": Preprocess((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic", 0.9, "center"),
    "squashed": Preprocess((3, 32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.875, "squash"),
    "grey, whole": Preprocess((1, 32, 32), (0.3,), (0.35,), "bilinear"),
}


@pytest.fixture(scope="module", params=[*WAYS, "pixels in"])
def file(request, tmp_path_factory):
    """(the ONNX file, the model, its preprocessing); the last file takes uint8 pixels."""
    whole = request.param not in WAYS
    how = WAYS["centre crop" if whole else request.param]
    made = dense_model(in_chans=how.input_size[0], num_classes=7, img_size=32, patch_size=16, embed_dim=48)
    model = TimmModel(made.ref, made.module, made.family, made.groups, how, {})
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    metadata = onnx_metadata(model, "test")
    finish = partial(with_pixels, preprocess=how) if whole else None
    size = how.input_size
    export_onnx(model.module, path, input_size=size, opset=20, metadata=metadata, simplify=True, finish=finish)
    return path, model.module, how


def pictures(folder, channels):
    rng = np.random.default_rng(0)
    for index, (height, width) in enumerate([(61, 97), (32, 32), (120, 50)] if channels == 3 else [(32, 32)]):
        pixels = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
        picture = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        picture.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
        yield folder / f"{index}.png"


def classified(python, *arguments):
    command = [*python, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_sees_what_the_model_sees(file, tmp_path):
    path, module, how = file
    files = list(pictures(tmp_path, how.input_size[0]))
    found = json.loads(classified([sys.executable, "-c", RUN], EXAMPLE, path, *files, "--json", "--top", 7))
    ours = Preprocessing(how.input_size, how.mean, how.std, how.interpolation, how.crop_pct, how.crop_mode)
    for file_ in files:
        with Image.open(file_) as picture:
            grey = torch.from_numpy(np.array(picture))[None, None]
            image = ours.of_picture(picture) if how.crop_pct is not None else ours.of_pixels(grey)[0]
        with torch.no_grad():
            shares = module(image[None]).softmax(1)[0]
        rows = found[str(file_)]
        assert [row["class"] for row in rows] == shares.argsort(descending=True).tolist()
        for row in rows:
            assert row["probability"] == pytest.approx(float(shares[row["class"]]), abs=1e-4)


def test_it_prints_labels_and_refuses_a_foreign_file(file, tmp_path):
    path, _, how = file
    (picture, *_) = pictures(tmp_path, how.input_size[0])
    (tmp_path / "labels.txt").write_text("\n".join(f"name {index}" for index in range(7)))
    lines = classified([sys.executable], EXAMPLE, path, picture, "--labels", tmp_path / "labels.txt", "--top", 2)
    assert len(lines.splitlines()) == 3
    assert "%  name " in lines
    import onnx

    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    done = subprocess.run([sys.executable, EXAMPLE, tmp_path / "foreign.onnx", picture], capture_output=True, text=True)
    assert done.returncode == 1
    assert "slimvit did not write it" in done.stderr


@pytest.mark.slow
def test_the_example_needs_numpy_onnxruntime_and_pillow_and_nothing_else(file, tmp_path):
    """Needs a package index: a virtual environment with these three alone."""
    path, _, how = file
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    subprocess.run([*pip, "numpy", "onnxruntime", "pillow"], check=True)
    (picture, *_) = pictures(tmp_path, how.input_size[0])
    there, here = (classified([each], EXAMPLE, path, picture, "--json") for each in (python, sys.executable))
    assert json.loads(there) == json.loads(here)
