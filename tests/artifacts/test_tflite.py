"""What a .tflite file tells, read without running it."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable

pytest.importorskip("ai_edge_litert.schema_py_generated", reason="pip install 'slimvit[litert]'")

DATA = Path(__file__).parents[1] / "targets/litert"
FP32, INT8 = DATA / "tiny.fp32.tflite", DATA / "tiny.int8-dynamic.tflite"


def changed(path, folder, change):
    """A copy that was changed as an object of its schema."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_with_mutable_tensors(path)
    change(model)
    flatbuffer_utils.write_model(model, folder / path.name)
    return open_artifact(folder / path.name)


def test_inputs_and_outputs_have_the_names_of_the_onnx_file():
    ours, source = open_artifact(FP32), open_artifact(FP32.with_suffix(".onnx"))
    assert [(each.name, each.type, each.shape[1:]) for each in ours.inputs] == [("image", "float32", (3, 16, 16))]
    assert [(each.name, each.type, each.shape[1:]) for each in ours.outputs] == [("logits", "float32", (5,))]
    assert ours.batches == (1, 3)
    assert ours.signature(3) == source.signature(3)
    assert ours.image == source.image
    with pytest.raises(RecipeError, match="for batches of 1, 3, asked for 8"):
        ours.signature(8)


def test_bytes_have_the_layers_of_the_onnx_file():
    ours, source = open_artifact(INT8), open_artifact(INT8.with_suffix(".onnx"))
    assert ours.parts["blocks.0.mlp.fc1", "weight"] == 16 * 64
    assert sum(ours.layers.values()) == INT8.stat().st_size
    layers = {layer for layer in source.layers if layer.startswith("blocks") and "norm" not in layer}
    assert layers == {layer for layer in ours.layers if layer.startswith("blocks") and "norm" not in layer}
    assert not [layer for layer in ours.layers if layer.startswith("arith")]


def test_params_count_what_graphs_share_once():
    ours, source = open_artifact(FP32), open_artifact(FP32.with_suffix(".onnx"))
    assert source.params * 0.95 <= ours.params <= source.params * 1.1, (
        "but for what was folded, and what a batch repeats"
    )


def test_params_of_weights_of_four_bits_are_counted(tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    def narrowed(model):
        for tensor in (each for graph in model.subgraphs for each in graph.tensors):
            data = model.buffers[tensor.buffer].data
            if tensor.type == TensorType.INT8 and data is not None:
                tensor.type, model.buffers[tensor.buffer].data = TensorType.INT4, data[: len(data) // 2]

    found = changed(INT8, tmp_path, narrowed)
    assert found.precision.name == "int4"
    assert found.params == open_artifact(INT8).params


def test_its_precision_is_that_of_its_weights(tmp_path):
    assert (open_artifact(FP32).precision.name, open_artifact(FP32).own_precision) == ("fp32", "fp32")
    assert open_artifact(INT8).own_precision == "int8-dynamic"

    def foreign(model):
        model.metadata = [each for each in model.metadata if each.name != b"slimvit"]

    other = changed(INT8, tmp_path, foreign)
    assert (other.precision.name, other.own_precision, other.preprocess) == ("int8", "", None)
    assert "int8 4" in other.precision.reason

    def lying(model):
        for entry in model.metadata:
            if entry.name == b"slimvit":
                model.buffers[entry.buffer].data = np.frombuffer(b'{"precision": "fp32"}', np.uint8)

    assert changed(INT8, tmp_path, lying).precision.name == "int8", "the graph has the last word"


def test_a_file_of_others_without_a_signature_is_refused(tmp_path):
    def unsigned(model):
        model.signatureDefs = []

    with pytest.raises(ArtifactError, match="no signature"):
        _ = changed(FP32, tmp_path, unsigned).inputs


@pytest.mark.parametrize("fault", ["short", "foreign", "metadata"])
def test_damage_is_an_error_of_the_file(fault, tmp_path):
    path = tmp_path / "m.tflite"
    whole = FP32.read_bytes()
    if fault == "metadata":

        def torn(model):
            for entry in model.metadata:
                if entry.name == b"slimvit":
                    model.buffers[entry.buffer].data = np.frombuffer(b'{"preprocess', np.uint8)

        with pytest.raises(ArtifactError, match="damaged metadata: slimvit"):
            _ = changed(FP32, tmp_path, torn).preprocess
        return
    path.write_bytes(whole[:2000] if fault == "short" else b"no model of anyone")
    with pytest.raises(ArtifactError, match=r"m\.tflite"):
        _ = open_artifact(path).params


def test_without_the_schema_it_says_what_brings_it(monkeypatch, tmp_path):
    path = Path(shutil.copy(FP32, tmp_path))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.schema_py_generated", None)
    assert open_artifact(path).size_bytes == FP32.stat().st_size
    with pytest.raises(TargetUnavailable, match=r"slimvit\[litert\]"):
        _ = open_artifact(path).params
    monkeypatch.undo()
    artifact = open_artifact(path)
    path.unlink()
    with pytest.raises(StorageError, match=r"tiny\.fp32\.tflite"):
        _ = artifact.params
