"""What an exported file says of its input, and what is refused."""

from __future__ import annotations

import json

import onnx
import pytest
from onnx import TensorProto, helper

from toolchain.artifact import Preprocess
from toolchain.errors import ArtifactError
from toolchain.export.calls import PREPROCESS, read_preprocess

GOOD = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25], "crop_pct": None}


@pytest.fixture
def file(tmp_path):
    """An ONNX file with the metadata that is given."""

    def write(**metadata):
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        model = helper.make_model(helper.make_graph([], "empty", [value], [value]))
        helper.set_model_props(model, metadata)
        onnx.save_model(model, tmp_path / "a.onnx")
        return tmp_path / "a.onnx"

    return write


def test_the_preprocessing_is_read_back(file):
    assert read_preprocess(file(**{PREPROCESS: json.dumps(GOOD)})) == Preprocess((1, 8, 8), (0.5,), (0.25,))


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({**GOOD, "input_size": [1, 8]}), json.dumps({"mean": [0]})])
def test_damaged_metadata_is_refused(file, text):
    with pytest.raises(ArtifactError, match=r"a\.onnx has damaged metadata"):
        read_preprocess(file(**{PREPROCESS: text}))


def test_a_foreign_file_is_refused(file):
    with pytest.raises(ArtifactError, match="slimvit did not write it"):
        read_preprocess(file())
