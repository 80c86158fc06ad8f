import json

import onnx
import pytest
from builders import TINY, dense_model
from onnx import TensorProto, helper

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.surgery.replay import save_model


def with_input(path, shape, dtype=TensorProto.FLOAT):
    node = helper.make_node("Identity", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])), path)
    return path


def test_an_open_batch_becomes_the_asked_one(tmp_path):
    signature = open_artifact(with_input(tmp_path / "m.onnx", ["n", 3, 8, 8])).signature(batch=5)
    assert signature.names == ("x",)
    assert [(spec.shape, spec.dtype) for spec in signature.inputs] == [((5, 3, 8, 8), "float32")]


def test_a_fixed_batch_serves_only_itself(tmp_path):
    path = with_input(tmp_path / "m.onnx", [2, 3, 8, 8])
    assert open_artifact(path).signature(batch=2).inputs[0].shape == (2, 3, 8, 8)
    with pytest.raises(RecipeError, match="fixed batch of 2, asked for 1"):
        open_artifact(path).signature(batch=1)


def test_an_open_shape_has_to_be_given_and_a_fixed_one_to_be_met(tmp_path):
    path = with_input(tmp_path / "m.onnx", ["n", 3, "h", "w"])
    with pytest.raises(RecipeError, match=r"open, \[3, \?, \?\] per sample; name it with --input-shape"):
        open_artifact(path).signature(batch=1)
    assert open_artifact(path).signature(1, (3, 8, 16)).inputs[0].shape == (1, 3, 8, 16)
    for wrong in ((1, 8, 8), (3, 8)):
        with pytest.raises(RecipeError, match="asked for"):
            open_artifact(path).signature(1, wrong)


def test_a_fixed_batch_names_the_option_that_meets_it_and_a_fixed_size_says_when_it_was_fixed(tmp_path):
    """Kind: messages that ask for a batch or a shape, and do not say where to give it."""
    path = with_input(tmp_path / "m.onnx", [4, 3, 8, 8])
    with pytest.raises(RecipeError, match="--batch 4 "):
        open_artifact(path).signature(batch=1)
    with pytest.raises(RecipeError, match="height and width of an ONNX file are fixed at export"):
        open_artifact(path).signature(4, (3, 16, 16))


def test_floats_of_other_bits_can_be_fed_the_same_values_and_nothing_else_can(tmp_path):
    kinds = {
        name: open_artifact(
            with_input(tmp_path / f"{name}.onnx", ["n", 3, 8, 8], getattr(TensorProto, name))
        ).signature(1)
        for name in ("FLOAT", "FLOAT16", "UINT8", "INT64")
    }
    assert kinds["FLOAT"].fits(kinds["FLOAT16"])
    assert kinds["UINT8"].fits(kinds["UINT8"])
    assert not kinds["FLOAT"].fits(kinds["UINT8"])
    assert not kinds["UINT8"].fits(kinds["INT64"])
    assert not kinds["FLOAT"].fits(open_artifact(with_input(tmp_path / "m.onnx", ["n", 3, 8, 9])).signature(1))


def test_inputs_that_cannot_be_generated_are_refused(tmp_path):
    for dtype in (TensorProto.STRING, TensorProto.BFLOAT16):
        with pytest.raises(RecipeError, match="type"):
            open_artifact(with_input(tmp_path / "m.onnx", ["n", 3], dtype)).signature(1)
    with pytest.raises(RecipeError, match="no batch"):
        open_artifact(with_input(tmp_path / "m.onnx", [])).signature(1)


def test_an_input_of_which_nothing_is_said_takes_what_is_named(tmp_path):
    """Kind: ncnn models as pnnx writes them, and ONNX files without shapes, of which it was said that they have no batch."""
    path = with_input(tmp_path / "m.onnx", None)
    with pytest.raises(RecipeError, match=r"leaves its shape open, \[\?\] per sample; name it with --input-shape"):
        open_artifact(path).signature(batch=1)
    assert open_artifact(path).signature(2, (3, 8, 16)).inputs[0].shape == (2, 3, 8, 16)
    with pytest.raises(RecipeError, match="no batch dimension"):
        open_artifact(with_input(tmp_path / "n.onnx", [])).signature(batch=1)


def test_a_model_folder_says_its_own_input_size(tmp_path):
    save_model(dense_model(**{**TINY, "in_chans": 1, "img_size": 8, "patch_size": 4}), tmp_path / "m")
    signature = open_artifact(tmp_path / "m").signature(batch=3)
    assert (signature.names, signature.inputs[0].shape) == (("image",), (3, 1, 8, 8))
    with pytest.raises(RecipeError, match="asked for"):
        open_artifact(tmp_path / "m").signature(3, (3, 8, 8))
    record = tmp_path / "m" / "model.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "preprocess": {"input_size": [1, "8"]}}))
    with pytest.raises(ArtifactError, match="input_size"):
        open_artifact(tmp_path / "m").signature(batch=3)


def test_what_has_no_signature_is_refused(tmp_path):
    with pytest.raises(StorageError):
        open_artifact(tmp_path / "absent.onnx").signature(1)
    (tmp_path / "x.engine").write_bytes(b"1")
    with pytest.raises(RecipeError, match=r"x\.engine"):
        open_artifact(tmp_path / "x.engine").signature(1)
