"""transformers.js itself, in Node, on a pushed folder: it finds each file by its dtype and reads the classes as ONNX Runtime does.

`npm install @huggingface/transformers` in a folder, and SLIMVIT_TRANSFORMERS_JS names it; it is too large for every run of the tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from toolchain.publish.folder import FolderDestination
from toolchain.publish.push import push
from toolchain.publish.repository import repository

FOLDER = os.environ.get("SLIMVIT_TRANSFORMERS_JS", "")
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER and NODE), reason="needs node, and SLIMVIT_TRANSFORMERS_JS to name its folder"),
]
PROGRAM = """
import { pipeline, env, RawImage } from "@huggingface/transformers";
const [models, picture, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = models;
const classify = await pipeline("image-classification", "org/digits", dtype ? { dtype } : {});
const image = (await RawImage.read(picture)).grayscale();
console.log(JSON.stringify(await classify(image, { top_k: 10 })));
"""


@pytest.fixture(scope="module")
def pushed(finished, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    push(repository(finished, "org/digits"), FolderDestination(models / "org/digits"), tool="slimvit 0", message="")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(models / "picture.png")
    return models


@pytest.mark.parametrize(
    ("dtype", "name"), [("", "model"), ("fp32", "model"), ("fp16", "model_fp16"), ("q8", "model_quantized")]
)
def test_a_page_reads_what_onnx_runtime_reads(pushed, tmp_path, dtype, name):
    program = tmp_path / "program.mjs"
    program.write_text(PROGRAM)
    (tmp_path / "node_modules").symlink_to(Path(FOLDER, "node_modules"))
    command = [NODE, "--preserve-symlinks", program, f"{pushed}/", pushed / "picture.png", dtype]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    scores = {each["label"]: each["score"] for each in json.loads(result.stdout)}
    processor = AutoImageProcessor.from_pretrained(pushed / "org/digits")
    pixels = processor(Image.open(pushed / "picture.png"), return_tensors="np")["pixel_values"]
    session = onnxruntime.InferenceSession(pushed / f"org/digits/onnx/{name}.onnx")
    (logits,) = session.run(["logits"], {"pixel_values": pixels})
    wanted = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert [scores[f"LABEL_{index}"] for index in range(10)] == pytest.approx(wanted.tolist(), abs=0.01)
