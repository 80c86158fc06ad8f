"""examples/web in a real headless Chromium, and in Node: a dropped picture gets the answer of examples/infer_onnx.py."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import dense_model
from PIL import Image
from sklearn.datasets import load_digits
from sweeps import swept
from web.chromium import opened

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.pixels import with_pixels
from toolchain.export.stage import onnx_metadata
from toolchain.model import Preprocess, TimmModel
from toolchain.outputs import CLASSES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE, PYTHON_EXAMPLE = ROOT / "examples" / "web", ROOT / "examples" / "infer_onnx.py"
RUNS = os.environ.get("SLIMVIT_DEMO_RUNS", "")
SCREENSHOT = os.environ.get("SLIMVIT_SCREENSHOT", "")
COLOUR = Preprocess((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic", 0.9, "center")
WAYS = {
    "centre crop": COLOUR,
    "turned": Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875, "center", exif_orientation=True),
    "grey, whole": Preprocess((1, 32, 32), (0.3,), (0.35,), "bilinear"),
    "pixels in": COLOUR,
}
DROP = """({ bytes, name, type }) => {
  const data = Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([data], name, { type }));
  document.querySelector("#drop").dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """(way, output) → the ONNX file of a tiny model with this preprocessing, written once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda way, output="logits": written(folder / f"{way} {output}.onnx", way, output))


def written(path, way, output):
    how = WAYS[way]
    made = dense_model(in_chans=how.input_size[0], num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=2)
    model = TimmModel(made.ref.model_copy(update={"output": output}), made.module, made.family, made.groups, how, {})
    finish = partial(with_pixels, preprocess=how) if way == "pixels in" else None
    metadata = onnx_metadata(model, "test")
    export_onnx(made.module, path, input_size=how.input_size, opset=20, metadata=metadata, simplify=True, finish=finish)
    return path


@pytest.fixture
def page(package, tmp_path):
    """A folder with the example and what it needs, but for model.onnx."""
    folder = tmp_path / "page"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    (folder / "node_modules").symlink_to(package)
    return folder


def picture(path, size=(97, 61), orientation=None):
    """A file of colours that vary slowly, as the browser and Pillow both read them."""
    rng = np.random.default_rng(0)
    rows, columns = size[1] // 4, size[0] // 4
    slope = np.linspace(0, 1, rows)[:, None, None] * np.linspace(0.3, 1, columns)[:, None]  # so that turning it shows
    pixels = Image.fromarray((rng.integers(100, 256, (rows, columns, 3)) * slope).astype(np.uint8))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    pixels.resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)
    return path


@pytest.fixture(scope="module")
def infer_onnx():
    """The Python example as a module."""
    spec = importlib.util.spec_from_file_location("infer_onnx", PYTHON_EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected_logits(infer_onnx, model, file):
    """What the Python example feeds, and what ONNX Runtime gives for it."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    how = json.loads(session.get_modelmeta().custom_metadata_map["slimvit.preprocess"])
    pixels_in = session.get_inputs()[0].type == "tensor(uint8)"
    return session.run(["logits"], {"image": infer_onnx.model_input(file, how, pixels_in=pixels_in)})[0][0]


def ready(shown):
    """Waits until the page has opened its model."""
    shown.wait_for_function(
        "/ready|error/.test(document.querySelector('#status').textContent + document.querySelector('#status').className)"
    )


def dropped(shown, file):
    """The logits that the page computes of a picture that is dropped on it."""
    shown.evaluate("() => delete document.body.dataset.logits")
    whole = base64.b64encode(file.read_bytes()).decode()
    shown.evaluate(DROP, {"bytes": whole, "name": file.name, "type": f"image/{file.suffix[1:]}"})
    shown.wait_for_function("document.body.dataset.logits || document.querySelector('#status.error')")
    assert not shown.query_selector("#status.error"), shown.text_content("#status")
    return np.array(json.loads(shown.evaluate("document.body.dataset.logits")))


def table(shown):
    """[(label, share as it is printed)]"""
    return [tuple(text.strip() for text in row.split("\t")[:2]) for row in shown.inner_text("#answer").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_dropped_picture_gets_the_answer_of_the_python_example(browser, page, model_of, tmp_path, infer_onnx, way):
    """Kind: a page that shows other classes than were evaluated, because it resizes, turns or scales pictures by itself."""
    shutil.copy(model_of(way), page / "model.onnx")
    files = [picture(tmp_path / "upright.png"), picture(tmp_path / "mirrored.png", orientation=5)]
    files += [picture(tmp_path / f"{each}.jpeg", (64, 50), orientation=each) for each in range(1, 9)]
    with opened(browser, page) as (shown, elsewhere):
        ready(shown)
        for file in files if way in ("turned", "centre crop") else files[:1]:
            if way == "grey, whole":
                Image.open(file).convert("L").resize((32, 32)).save(file)
            expected = expected_logits(infer_onnx, page / "model.onnx", file)
            np.testing.assert_allclose(dropped(shown, file), expected, atol=1e-4 * max(1, np.abs(expected).max()))
        shares = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
        best = np.argsort(-shares)[:5]
        assert [label for label, _ in table(shown)] == [str(index) for index in best]
        for (_, text), index in zip(table(shown), best, strict=True):
            assert float(text.removesuffix(" %")) == pytest.approx(100 * shares[index], abs=0.5)
    assert elsewhere == [], "the page asks no one else"
    if way == "turned":
        unturned = expected_logits(infer_onnx, page / "model.onnx", picture(tmp_path / "same.jpeg", (64, 50)))
        assert np.abs(unturned - expected).max() > 2e-3, "the orientation shows, by far more than is allowed"


def test_a_picture_can_be_chosen_and_labels_be_named(browser, page, model_of, tmp_path):
    shutil.copy(model_of("centre crop"), page / "model.onnx")
    (page / "labels.txt").write_text("".join(f"name {index}\n" for index in range(7)))
    model = onnx.load(page / "model.onnx")
    model.metadata_props.add(key=CLASSES, value=json.dumps([f"class {index}" for index in range(7)]))
    onnx.save(model, page / "model.onnx")
    for query, begin in (("?labels=labels.txt", "name "), ("", "class ")):
        with opened(browser, page, query=query) as (shown, _):
            ready(shown)
            shown.set_input_files("#drop input", picture(tmp_path / "a.png"))
            shown.wait_for_selector("#answer tr")
            assert all(label.startswith(begin) for label, _ in table(shown))
            assert "one call took" in shown.text_content("#status")


def test_what_cannot_be_answered_is_said(browser, page, model_of, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    shutil.copy(model_of("centre crop"), page / "model.onnx")
    shutil.copy(model_of("centre crop", "features"), page / "features.onnx")
    model = onnx.load(page / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, page / "foreign.onnx")
    (page / "short.onnx").write_bytes((page / "model.onnx").read_bytes()[:-50])
    said = {
        "?model=foreign.onnx": "slimvit did not write it",
        "?model=features.onnx": "which have no classes",
        "?model=absent.onnx": "absent.onnx is not there (404)",
        "?model=short.onnx": "truncated",
    }
    with opened(browser, page) as (shown, _):
        ready(shown)
        with pytest.raises(AssertionError, match=r"damaged\.png: "):
            dropped(shown, damaged)
        address = shown.url
        for query, words in said.items():
            shown.goto(f"{address}{query}")
            shown.wait_for_selector("#status.error")
            assert words in shown.text_content("#status"), query


def test_the_metadata_is_read_from_the_file_alone(model_of, tmp_path):
    """Against onnx's own reader; of files with weights of any size, as only lengths are read of these."""
    file = Path(shutil.copy(model_of("turned"), tmp_path / "m.onnx"))
    model = onnx.load(file)
    model.metadata_props.add(key="empty", value="")
    model.metadata_props.add(key="words", value="ä, 漢字" * 100)
    onnx.save(model, file)
    if shutil.which("node") is None:
        pytest.skip("there is no program node")
    script = "import(process.argv[1]).then(({ metadata }) => console.log(JSON.stringify(metadata(require('fs').readFileSync(process.argv[2])))))"
    done = subprocess.run(
        ["node", "-e", script, str(EXAMPLE / "metadata.mjs"), str(file)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == OnnxFile(file).metadata


@pytest.mark.parametrize("way", swept(WAYS, ["turned", "pixels in"]))
def test_node_gives_the_answer_of_the_python_example(model_of, tmp_path, way):
    if shutil.which("node") is None or not (EXAMPLE / "node_modules" / "sharp").is_dir():
        pytest.skip("npm ci has not been run in examples/web")
    model, file = model_of(way), picture(tmp_path / "a.png", orientation=6)
    if way == "grey, whole":
        Image.open(file).convert("L").resize((32, 32)).save(file)
    commands = ["node", str(EXAMPLE / "classify.mjs")], [sys.executable, str(PYTHON_EXAMPLE)]
    done = [
        subprocess.run([*each, str(model), str(file), *more], capture_output=True, text=True, check=True)
        for each, more in zip(commands, ([], ["--json"]), strict=True)
    ]
    ours, theirs = (json.loads(each.stdout)[str(file)] for each in done)
    assert [row["class"] for row in ours] == [row["class"] for row in theirs]
    assert [row["probability"] for row in ours] == pytest.approx([row["probability"] for row in theirs], abs=1e-4)


def test_the_node_example_is_short_and_its_versions_are_those_of_the_target():
    assert len((EXAMPLE / "classify.mjs").read_text(encoding="utf-8").splitlines()) <= 30
    target = ROOT / "toolchain" / "targets" / "ort_web"
    locks = [json.loads((folder / "package-lock.json").read_text(encoding="utf-8")) for folder in (EXAMPLE, target)]
    pinned = [lock["packages"]["node_modules/onnxruntime-web"] for lock in locks]
    assert pinned[0] == pinned[1]
    assert [
        json.loads((folder / "package.json").read_text(encoding="utf-8"))["dependencies"]["onnxruntime-web"]
        for folder in (EXAMPLE, target)
    ] == [pinned[0]["version"]] * 2


@pytest.mark.skipif(not RUNS, reason="SLIMVIT_DEMO_RUNS is not set: no demo run to look at")
def test_the_page_reads_digits_with_the_demos_file(browser, page, tmp_path, infer_onnx):
    """With SLIMVIT_SCREENSHOT=docs/web.png the page is drawn anew."""
    model = shutil.copy(Path(RUNS) / "digits_vit" / "onnx" / "compressed.fp32.onnx", page / "model.onnx")
    digits = load_digits()
    (page / "labels.txt").write_text("".join(f"{index}\n" for index in range(10)))
    right = 0
    with opened(browser, page, query="?labels=labels.txt") as (shown, _):
        ready(shown)
        for index in range(-10, 0):
            pixels = Image.fromarray((digits.images[index] * 255 / 16).round().astype(np.uint8))
            file = tmp_path / f"digit{index}.png"
            pixels.resize((256, 256), Image.Resampling.BICUBIC).save(file)
            logits = dropped(shown, file)
            expected = expected_logits(infer_onnx, model, file)
            np.testing.assert_allclose(logits, expected, atol=1e-4 * max(1, np.abs(expected).max()))
            right += int(logits.argmax()) == digits.target[index]
        drawn = Path(SCREENSHOT) if SCREENSHOT else tmp_path / "web.png"
        shown.screenshot(path=drawn)
    assert right >= 8
    assert drawn.stat().st_size < 200_000
