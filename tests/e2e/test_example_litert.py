"""examples/infer_litert.py on a file of slimvit: the classes of the ONNX file that it was made from, with nothing else installed."""

import json
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
schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
flatbuffers = pytest.importorskip("flatbuffers")

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


def test_the_example_reads_a_yes_or_no_each_and_refuses_what_has_no_classes(tmp_path):
    """Kind: a softmax over outputs that are none of one distribution, which shares one whole among them."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    shares = {
        kind: [float(each) / 100 for each in re.findall(r": ([\d.]+)%", _run(tmp_path, kind).stdout)]
        for kind in ("logits", "multi-label")
    }
    odds = np.array(shares["multi-label"]) / (1 - np.array(shares["multi-label"]))
    assert odds / odds.sum() == pytest.approx(shares["logits"], abs=2e-3), "the same outputs, read otherwise"
    refused = _run(tmp_path, "features")
    assert refused.returncode == 1
    assert "gives features, which have no classes" in refused.stderr


def _run(folder, kind):
    """The example on a file that says what its outputs are."""
    model = schema.ModelT.InitFromPackedBuf(MODEL.read_bytes(), 0)
    (entry,) = (entry for entry in model.metadata if entry.name == b"slimvit")
    told = json.loads(bytes(model.buffers[entry.buffer].data))
    model.buffers[entry.buffer].data = list(json.dumps({**told, "output": kind}).encode())
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    (folder / f"{kind}.tflite").write_bytes(builder.Output())
    command = [sys.executable, "-c", RUN, EXAMPLE, folder / f"{kind}.tflite", folder / "red.png"]
    return subprocess.run(command, capture_output=True, text=True)


def _tensor(picture):
    import torch

    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def test_the_example_is_short_and_the_one_that_was_not_compiled_says_so():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 60
    assert "Not compiled here" in EXAMPLE.with_name("InferLiteRt.kt").read_text(encoding="utf-8")
