"""examples/infer_onnx.py on files of slimvit: the classes that the model itself gives, without torch and timm."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import modes
import numpy as np
import pytest
import torch
from builders import dense_model, input_of
from PIL import Image
from timm.data.transforms_factory import create_transform

from toolchain.data.pictures import eight_bit
from toolchain.data.transforms import CROP_MODES, INTERPOLATIONS, Preprocessing
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.pixels import with_pixels
from toolchain.export.stage import onnx_metadata
from toolchain.model import Preprocess, TimmModel
from toolchain.outputs import CLASSES

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "infer_onnx.py"
# torch and timm cannot be imported: the script is run as on a machine that has neither.
WITHOUT = "import runpy, sys; sys.modules.update(torch=None, timm=None, torchvision=None, toolchain=None); "
RUN = WITHOUT + "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
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
    made = dense_model(in_chans=how.input_size[0], num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=1)
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


@pytest.mark.slow
def test_the_example_sees_what_the_model_sees(file, tmp_path):
    path, module, how = file
    files = list(pictures(tmp_path, how.input_size[0]))
    found = json.loads(classified([sys.executable, "-c", RUN], EXAMPLE, path, *files, "--json", "--top", 7))
    ours = Preprocessing(how.input_size, how.mean, how.std, how.interpolation, how.crop_pct, how.crop_mode)
    for file_ in files:
        with Image.open(file_) as picture:
            grey = torch.from_numpy(np.array(picture))[None, None]
            image = input_of(ours, picture) if how.crop_pct is not None else ours.of_pixels(grey)[0]
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
    onnx.helper.set_model_props(
        model,
        {
            **{each.key: each.value for each in model.metadata_props},
            CLASSES: json.dumps([f"class {index}" for index in range(7)]),
        },
    )
    onnx.save(model, tmp_path / "named.onnx")
    assert "%  class " in classified([sys.executable], EXAMPLE, tmp_path / "named.onnx", picture), "the file names them"
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    done = subprocess.run([sys.executable, EXAMPLE, tmp_path / "foreign.onnx", picture], capture_output=True, text=True)
    assert done.returncode == 1
    assert "slimvit did not write it" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("output", "classes"), [("regression", 1), ("multi-label", 1), ("multi-label", 5)])
def test_outputs_that_are_no_classes_are_read_as_what_they_are(tmp_path, output, classes):
    """Kind: outputs without classes. A softmax would call a single number certain, and share one whole among yes-or-no outputs."""
    how = WAYS["squashed"]
    made = dense_model(num_classes=classes, img_size=32, patch_size=16, embed_dim=48, depth=1)
    model = TimmModel(made.ref.model_copy(update={"output": output}), made.module, made.family, made.groups, how, {})
    metadata, path = onnx_metadata(model, "test"), tmp_path / "m.onnx"
    export_onnx(model.module, path, input_size=how.input_size, opset=20, metadata=metadata, simplify=True)
    (picture, *_) = pictures(tmp_path, 3)
    rows = json.loads(classified([sys.executable, "-c", RUN], EXAMPLE, path, picture, "--json"))[str(picture)]
    with Image.open(picture) as opened:
        image = input_of(Preprocessing(**{**vars(how), "exif_orientation": False}), opened)
    expected = made.module(image[None])[0].detach()
    expected = expected if output == "regression" else expected.sigmoid()
    said = "value" if output == "regression" else "probability"
    assert {row["class"]: row[said] for row in rows} == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-4)
    assert classified([sys.executable, "-c", RUN], EXAMPLE, path, picture).count("\n") == classes + 1


def test_a_damaged_picture_is_a_line_and_no_traceback(file, tmp_path):
    path, *_ = file
    picture = next(pictures(tmp_path, 3))
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40] + b"damaged" + whole[47:])
    done = subprocess.run([sys.executable, EXAMPLE, path, picture], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"cannot read {picture}: ")


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """The command of a Python that finds three packages and the standard library."""
    folder, site = tmp_path_factory.mktemp("bare"), Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs", "onnxruntime", "PIL", "pillow.libs"):
        (folder / name).symlink_to(site / name)
    python = ["env", f"PYTHONPATH={folder}", sys.executable, "-S"]
    assert subprocess.run([*python, "-c", "import onnx"], capture_output=True).returncode == 1
    return python


def test_the_example_needs_numpy_onnxruntime_and_pillow_and_nothing_else(file, bare_python, tmp_path):
    path, _, how = file
    (picture, *_) = pictures(tmp_path, how.input_size[0])
    there, here = (classified(each, EXAMPLE, path, picture, "--json") for each in (bare_python, [sys.executable]))
    assert json.loads(there) == json.loads(here)


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("infer_onnx", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("crop_mode", CROP_MODES)
@pytest.mark.parametrize("input_size", [(3, 32, 32), (3, 24, 40), (3, 45, 17), (1, 16, 30)], ids=str)
def test_the_example_prepares_pictures_as_timm_does(example, tmp_path, crop_mode, input_size):
    """Kind: an input size or crop mode that the metadata can hold and the app cannot. Pixel for pixel timm's own."""
    grey = input_size[0] == 1
    mean, std = ((0.3,), (0.35,)) if grey else (MEAN, STD)
    sizes = [(61, 97), (120, 50), (40, 40), (33, 32), (9, 200), (5, 7)]
    rng = np.random.default_rng(0)
    files = []
    for width, height in sizes:
        files.append(tmp_path / f"{width}x{height}.png")
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if grey else pixels).save(files[-1])
    for interpolation, crop_pct in itertools.product(INTERPOLATIONS, (0.875, 0.9, 1.0, 1.15)):
        how = {"input_size": input_size, "mean": mean, "std": std, "crop_pct": crop_pct}
        how |= {"interpolation": interpolation, "crop_mode": crop_mode}
        theirs = create_transform(**how)
        for path in files:
            with Image.open(path) as picture:
                expected = theirs(picture).numpy()
            seen = example.model_input(path, how, pixels_in=False)
            assert seen.shape == (1, *input_size)
            np.testing.assert_allclose(seen[0], expected, atol=1e-6, err_msg=f"{how} {path.name}")


def test_a_whole_picture_without_a_crop_is_resized_to_within_a_step(example, tmp_path):
    ours = Preprocessing((1, 24, 16), (0.0,), (1.0,), "bilinear")
    pixels = np.random.default_rng(0).integers(0, 256, (41, 50), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    how = {"input_size": (1, 24, 16), "mean": (0.0,), "std": (1.0,), "interpolation": "bilinear"}
    seen = example.model_input(tmp_path / "a.png", how | {"crop_pct": None, "crop_mode": None}, pixels_in=False)
    expected = ours.of_pixels(torch.from_numpy(pixels)[None, None]).numpy()
    assert np.abs(seen - expected).max() <= 1 / 255


@pytest.mark.parametrize("path", modes.FILES, ids=str)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("turn", [False, True])
def test_the_example_reads_every_mode_as_slimvit_does(example, tmp_path, path, mode, turn):
    """Kind: a picture whose pixels lose their scale, in the app alone."""
    modes.write(tmp_path / path)

    def read(rule):
        with Image.open(tmp_path / path) as picture:
            try:
                return np.asarray(rule(picture, mode, turn=turn)).tolist()
            except ValueError:
                return "refused"

    assert read(example.eight_bit) == read(eight_bit)


def test_the_example_turns_pictures_where_the_metadata_says_so(example, tmp_path):
    """Kind: EXIF orientation that the model's trainer heeded and the app does not."""
    path = modes.write(tmp_path / "turned.png")
    how = {"input_size": (3, 10, 12), "interpolation": "bicubic", "crop_pct": None, "crop_mode": None}
    turned = example.model_input(path, how | {"exif_orientation": True}, pixels_in=True)[0]
    assert np.array_equal(turned, np.rot90(modes.COLOUR, -1))
    stored = example.model_input(path, how | {"input_size": (3, 12, 10)}, pixels_in=True)[0]
    assert np.array_equal(stored, modes.COLOUR)
