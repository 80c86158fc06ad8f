"""Values of a graph are renamed everywhere or not at all, and nothing else changes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.errors import ArtifactError
from toolchain.publish.renamed import referring_to, renamed


def branching() -> onnx.ModelProto:
    """image → image · 2 if its sum is positive, else −image: the branches read the image from outside."""
    then = helper.make_graph(
        [helper.make_node("Mul", ["image", "two"], ["a"])],
        "then",
        [],
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [2])],
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["image"], ["b"])],
        "else",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["logits"], then_branch=then, else_branch=other),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2])],
        [
            numpy_helper.from_array(np.float32(2), "two"),
            numpy_helper.from_array(np.float32(0), "zero"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def outputs(model: onnx.ModelProto, values: list[float]) -> list[float]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.array(values, np.float32)})[0].tolist()


@pytest.mark.parametrize("values", [[1.0, 2.0], [-1.0, -2.0]])
def test_what_is_renamed_computes_the_same_also_within_branches(values):
    model = branching()
    result = renamed(model, {"image": "pixel_values", "logits": "out"})
    assert [value.name for value in result.graph.input] == ["pixel_values"]
    assert [value.name for value in result.graph.output] == ["out"]
    assert b"image" not in result.SerializeToString()
    onnx.checker.check_model(result, full_check=True)
    assert outputs(result, values) == outputs(model, values)
    assert [value.name for value in model.graph.input] == ["image"], "the graph that was given stays as it is"


@pytest.mark.parametrize("taken", ["sum", "two", "a"])
def test_a_name_that_is_taken_is_refused(taken):
    with pytest.raises(ArtifactError, match="has such a name already"):
        renamed(branching(), {"image": taken})


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ArtifactError, match="no value nothing"):
        renamed(branching(), {"nothing": "else"})


def test_weights_beside_a_graph_are_found_under_their_new_name(tmp_path):
    model = branching()
    weights = np.arange(2000, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, "weights"))
    onnx.save_model(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=1000)
    bare = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    onnx.save(referring_to(bare, "b.data"), tmp_path / "b.onnx")
    (tmp_path / "a.data").rename(tmp_path / "b.data")
    stored = next(t for t in onnx.load(tmp_path / "b.onnx").graph.initializer if t.name == "weights")
    assert np.array_equal(numpy_helper.to_array(stored), weights)
