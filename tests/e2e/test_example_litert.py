"""examples/infer_litert.py on a file of slimvit: the classes of the ONNX file that it was made from, with nothing else installed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from toolchain.artifacts import open_artifact
from toolchain.data.transforms import Preprocessing

pytest.importorskip("ai_edge_litert.interpreter", reason="pip install 'slimvit[litert]'")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, MODEL = ROOT / "examples/infer_litert.py", ROOT / "tests/targets/litert/tiny.fp32.tflite"
# As on a machine that has none of these.
RUN = (
    "import runpy, sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'toolchain', 'onnx', 'onnxruntime'))); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_the_example_prepares_a_picture_from_the_file_alone(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("wide", (61, 40)), ("small", (16, 16))):
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    files = [tmp_path / "wide.png", tmp_path / "small.png"]
    done = subprocess.run([sys.executable, "-c", RUN, EXAMPLE, MODEL, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    how = open_artifact(MODEL.with_suffix(".onnx")).preprocess
    session = ort.InferenceSession(MODEL.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
    prepared = Preprocessing(how.input_size, how.mean, how.std, how.interpolation, how.crop_pct, how.crop_mode)
    for path, line in zip(files, lines, strict=True):
        with Image.open(path) as picture:
            resized = picture.resize((16, 16), Image.Resampling.BILINEAR)
        image = np.asarray(prepared.of_pixels(_tensor(resized))[0])[None]
        logits = session.run(None, {"image": image})[0][0]
        shares = np.exp(logits) / np.exp(logits).sum()
        told = {int(index): float(share) / 100 for index, share in re.findall(r"(\d): ([\d.]+)%", line)}
        assert [*told] == np.argsort(-shares).tolist()
        assert [told[index] for index in range(5)] == pytest.approx(shares, abs=1e-4)


def _tensor(picture):
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def test_the_example_is_short_and_the_one_that_was_not_compiled_says_so():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60
    assert "Not compiled here" in EXAMPLE.with_name("InferLiteRt.kt").read_text(encoding="utf-8")
