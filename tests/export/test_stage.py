"""What an exported file says of its input, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from builders import TINY, dense_model
from onnx import TensorProto, helper
from PIL import Image

from toolchain.artifacts.onnx_file import PREPROCESS, OnnxFile
from toolchain.errors import ArtifactError, DataError, ParityError
from toolchain.export import stage
from toolchain.export.preparation import Preparation, prepared, resized_source
from toolchain.export.stage import Export, fixed_size_notes
from toolchain.model import Preprocess, run_stage
from toolchain.recipe import ExportSection

GOOD = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "crop_pct": None}


@pytest.fixture
def file(tmp_path):
    """An ONNX file with the metadata that is given."""

    def write(**metadata):
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])
        model = helper.make_model(helper.make_graph([], "empty", [value], [value]))
        helper.set_model_props(model, metadata)
        onnx.save_model(model, tmp_path / "a.onnx")
        return tmp_path / "a.onnx"

    return write


def test_the_preprocessing_is_read_back(file):
    assert OnnxFile(file(**{PREPROCESS: json.dumps(GOOD)})).preprocess == Preprocess((1, 8, 8), (0.5,), (0.25,))


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({**GOOD, "input_size": [1, 8]}), json.dumps({"mean": [0]})])
def test_damaged_metadata_is_refused(file, text):
    with pytest.raises(ArtifactError, match=r"a\.onnx has damaged metadata"):
        _ = OnnxFile(file(**{PREPROCESS: text})).preprocess


def test_a_foreign_file_is_refused(file):
    foreign = OnnxFile(file())
    assert foreign.preprocess is None
    with pytest.raises(ArtifactError, match=r"slimvit did not write it.* --mean and --std"):
        prepared(foreign, Preparation(), (1, 8, 8))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, []),
        ({"dynamic_img_size": True}, ["dynamic_img_size"]),
        ({"dynamic_img_pad": True}, ["dynamic_img_pad"]),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, ["dynamic_img_size and dynamic_img_pad"]),
        ({"name": "vit_small_patch16_rope_224", "dynamic_img_size": True}, ["dynamic_img_size"]),
    ],
)
def test_a_dynamic_image_size_that_the_file_loses_is_told(kwargs, said):
    """Kind: what was asked for in kwargs and is not in the file."""
    model = dense_model(**{**TINY, "name": "vit_tiny_patch16_224", **kwargs})
    wanted = [
        f"The model has {what}; height and width of an ONNX file are fixed at export, here at 32×32." for what in said
    ]
    assert fixed_size_notes(model.module, model.preprocess) == wanted


def test_the_note_is_in_what_export_tells(tmp_path):
    model = dense_model(**{**TINY, "dynamic_img_size": True})
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    export = Export(ExportSection(simplify=False), tmp_path / "a.onnx", images, False, "test")
    (note,) = run_stage(export, model).facts.notes
    assert "fixed at export, here at 32×32" in note


def test_an_export_that_is_not_the_model_replaces_nothing(tmp_path, monkeypatch):
    """Kind: work that fails and takes an earlier file of the user with it."""
    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
    export = Export(ExportSection(simplify=False), tmp_path / "a.onnx", images, False, "test")
    (tmp_path / "a.onnx").write_bytes(b"an earlier file")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "torch_call", lambda _: lambda batch: batch.reshape(len(batch), -1)[:, :10])
        with pytest.raises(ParityError):
            run_stage(export, dense_model(**TINY))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an earlier file"]
    assert run_stage(export, dense_model(**TINY)).facts.files == (tmp_path / "a.onnx",)


def test_a_crop_mode_and_a_turn_that_are_asked_for_are_those_of_the_pictures(file, tmp_path):
    """They replace what a file declares, as `mean` does; a source that never crops refuses a crop."""
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        for grey in range(4):
            Image.new("L", (8, 12), 10 * grey + len(name) + ord(name[-1])).save(tmp_path / name / f"{grey}.png")
    asked = Preparation(mean=(0.5,), std=(0.5,), crop_mode="squash", exif_orientation=True)
    how, _ = prepared(OnnxFile(file()), asked, (1, 8, 8))
    assert (how.crop_mode, how.exif_orientation) == ("squash", True)
    source = resized_source(f"imagefolder:{tmp_path}", how, asked)
    assert (source.preprocessing.crop_mode, source.preprocessing.exif_orientation) == ("squash", True)
    with pytest.raises(DataError, match=r"never cropped, but data\.crop_mode is squash"):
        resized_source("digits", how, asked)
