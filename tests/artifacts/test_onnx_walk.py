"""What walks over graphs stand on: stored tensors are found and left alone, and what cannot be read is told."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_walk import linked, linked_weights, only_reader, stored, unscaled
from toolchain.errors import ArtifactError


def graph(*nodes, kind=TensorProto.FLOAT):
    """x [2] → y, with an initializer "w" [2] and a scale "s"."""
    x, y = (helper.make_tensor_value_info(name, kind, [2]) for name in "xy")
    weights = [numpy_helper.from_array(np.ones(2, np.int8), "w"), numpy_helper.from_array(np.float32(0.5), "s")]
    return helper.make_model(helper.make_graph(list(nodes), "g", [x], [y], weights), ir_version=10)


def test_a_cast_is_looked_through_where_what_it_casts_is_stored():
    nodes = [helper.make_node("Cast", [name], [f"{name}.cast"], to=TensorProto.FLOAT) for name in "wx"]
    add = list(linked(graph(*nodes, helper.make_node("Add", ["w.cast", "x.cast"], ["y"]))).graph)[-1]
    assert [unscaled(each).name for each in add.inputs] == ["w", "x.cast"]


def test_stored_tensors_are_initializers_and_constants_as_they_are():
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.full(2, 3, np.float32), "own"))
    scaled = helper.make_node("DequantizeLinear", ["w", "s"], ["d"])
    model = graph(
        constant, scaled, helper.make_node("Clip", ["x", "", "d"], ["b"]), helper.make_node("Sum", list("bcb"), ["y"])
    )
    before = model.SerializeToString()
    clip, total = list(linked(model).graph)[2:]
    x, left_out, d = clip.inputs
    assert [stored(each) for each in (x, left_out, d)] == [None] * 3
    assert stored(unscaled(d)).numpy().tolist() == [1, 1]
    assert (unscaled(x), unscaled(left_out)) == (x, None)
    assert stored(total.inputs[1]).numpy().tolist() == [3, 3]
    assert only_reader(x) is clip
    assert only_reader(clip.outputs[0]) is None, "it is read twice, if by one node"
    assert only_reader(total.outputs[0]) is None
    assert model.SerializeToString() == before


def test_large_weights_are_there_in_a_block_only():
    model = graph(helper.make_node("Add", ["x", "large"], ["y"]))
    values = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(values, "large"))
    with linked_weights(model) as walk:
        (_, large) = next(iter(walk)).inputs
        np.testing.assert_array_equal(stored(large).numpy(), values)
    assert stored(large) is None
    described = stored(linked(model).graph.initializers["large"])
    assert (described.shape, described.dtype) == (values.shape, TensorProto.FLOAT)
    with pytest.raises(FileNotFoundError):
        described.numpy()


def test_a_graph_that_onnx_ir_cannot_read_is_told(tmp_path):
    values = numpy_helper.from_array(np.ones(1, np.float32), "v")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64), "i"), [2])
    model = graph(
        helper.make_node("Constant", [], ["c"], sparse_value=sparse), helper.make_node("Add", ["x", "c"], ["y"])
    )
    onnx.save(model, tmp_path / "m.onnx")
    file = open_artifact(tmp_path / "m.onnx")
    assert (file.params, file.nodes) == (3, 2), "what is stored is counted without it, sparse values too"
    for told in ("inputs", "precision"):
        with pytest.raises(ArtifactError, match=rf"onnx-ir .* cannot read {file.path}: .*export it"):
            getattr(file, told)
