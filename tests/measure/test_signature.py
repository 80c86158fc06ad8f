import json

import onnx
import pytest
from onnx import TensorProto, helper

from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.measure.signature import read_signature


def with_input(path, shape, dtype=TensorProto.FLOAT):
    node = helper.make_node("Identity", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])), path)
    return path


def test_an_open_batch_becomes_the_asked_one(tmp_path):
    signature = read_signature(with_input(tmp_path / "m.onnx", ["n", 3, 8, 8]), batch=5)
    assert signature.names == ("x",)
    assert [(spec.shape, spec.dtype) for spec in signature.inputs] == [((5, 3, 8, 8), "float32")]


def test_a_fixed_batch_serves_only_itself(tmp_path):
    path = with_input(tmp_path / "m.onnx", [2, 3, 8, 8])
    assert read_signature(path, batch=2).inputs[0].shape == (2, 3, 8, 8)
    with pytest.raises(RecipeError, match="fixed batch of 2, asked for 1"):
        read_signature(path, batch=1)


def test_an_open_shape_has_to_be_given_and_a_fixed_one_to_be_met(tmp_path):
    path = with_input(tmp_path / "m.onnx", ["n", 3, "h", "w"])
    with pytest.raises(RecipeError, match=r"open, \[3, \?, \?\] per sample; name it with --input-shape"):
        read_signature(path, batch=1)
    assert read_signature(path, 1, (3, 8, 16)).inputs[0].shape == (1, 3, 8, 16)
    for wrong in ((1, 8, 8), (3, 8)):
        with pytest.raises(RecipeError, match="asked for"):
            read_signature(path, 1, wrong)


def test_a_fixed_batch_names_the_option_that_meets_it_and_a_fixed_size_says_when_it_was_fixed(tmp_path):
    """Kind: messages that ask for a batch or a shape, and do not say where to give it."""
    path = with_input(tmp_path / "m.onnx", [4, 3, 8, 8])
    with pytest.raises(RecipeError, match="--batch 4 "):
        read_signature(path, batch=1)
    with pytest.raises(RecipeError, match="height and width of an ONNX file are fixed at export"):
        read_signature(path, 4, (3, 16, 16))


def test_floats_of_other_bits_can_be_fed_the_same_values_and_nothing_else_can(tmp_path):
    kinds = {
        name: read_signature(with_input(tmp_path / f"{name}.onnx", ["n", 3, 8, 8], getattr(TensorProto, name)), 1)
        for name in ("FLOAT", "FLOAT16", "UINT8", "INT64")
    }
    assert kinds["FLOAT"].fits(kinds["FLOAT16"])
    assert kinds["UINT8"].fits(kinds["UINT8"])
    assert not kinds["FLOAT"].fits(kinds["UINT8"])
    assert not kinds["UINT8"].fits(kinds["INT64"])
    assert not kinds["FLOAT"].fits(read_signature(with_input(tmp_path / "m.onnx", ["n", 3, 8, 9]), 1))


def test_inputs_that_cannot_be_generated_are_refused(tmp_path):
    for dtype in (TensorProto.STRING, TensorProto.BFLOAT16):
        with pytest.raises(RecipeError, match="type"):
            read_signature(with_input(tmp_path / "m.onnx", ["n", 3], dtype), 1)
    with pytest.raises(RecipeError, match="no batch"):
        read_signature(with_input(tmp_path / "m.onnx", []), 1)


def test_a_model_folder_says_its_own_input_size(tmp_path):
    record = tmp_path / "model.json"
    record.write_text(json.dumps({"input_size": [1, 8, 8]}))
    signature = read_signature(tmp_path, batch=3)
    assert (signature.names, signature.inputs[0].shape) == (("image",), (3, 1, 8, 8))
    with pytest.raises(RecipeError, match="asked for"):
        read_signature(tmp_path, 3, (3, 8, 8))
    record.write_text(json.dumps({"input_size": [1, "8"]}))
    with pytest.raises(ArtifactError, match="input_size"):
        read_signature(tmp_path, batch=3)


def test_what_has_no_signature_is_refused(tmp_path):
    with pytest.raises(StorageError):
        read_signature(tmp_path / "absent.onnx", 1)
    (tmp_path / "x.engine").write_bytes(b"1")
    with pytest.raises(RecipeError, match=r"x\.engine"):
        read_signature(tmp_path / "x.engine", 1)
