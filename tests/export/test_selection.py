"""Selection moves up to where it saves work, and the graph stays the same function."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import dense_model
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from toolchain.export.onnx_graph import export_onnx
from toolchain.export.selection import selected_early

RNG = np.random.default_rng(0)
X = "batch", 5, 6
SELECTIONS = "Slice", "Gather"
WEIGHTS = {
    "half": np.array(0.5, np.float32),
    "one": np.array(1),
    "first": np.array([0]),
    "last": np.array(-1),
    "two": np.array([3, 1]),
    "order": np.array([4, 3, 2, 1, 0]),
    "vector": RNG.standard_normal(6, np.float32),
    "matrix": RNG.standard_normal((6, 4), np.float32),
    "tokens": RNG.standard_normal((1, 5, 6), np.float32),
    "heads": np.array([-1, 5, 2, 3]),
    "merged": np.array([-1, 30]),
    "rows": np.array([-1, 6]),
    "split": np.array([3, -1, 5, 2]),
}


def graph_of(*nodes, outputs=("y",)):
    """A graph of x [batch, 5, 6]; a node is (operator, inputs, outputs with spaces between them, attributes)."""
    made = [
        helper.make_node(op, given, out.split(), name=f"node_{out}", **attributes)
        for op, given, out, attributes in nodes
    ]
    read = {name for node in made for name in node.input}
    tensors = [numpy_helper.from_array(value, name) for name, value in WEIGHTS.items() if name in read]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        tensors,
    )
    model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    onnx.checker.check_model(model, full_check=True)
    return model


def same_function(one, other):
    onnx.checker.check_model(other, full_check=True)
    names = [[value.name for value in each.graph.output] for each in (one, other)]
    assert names[0] == names[1]
    for batch in (1, 3):
        x = RNG.standard_normal((batch, *X[1:]), np.float32)
        for before, after in zip(*(ReferenceEvaluator(each).run(None, {"x": x}) for each in (one, other)), strict=True):
            np.testing.assert_allclose(after, before, atol=1e-6, rtol=1e-6)


PASSED = {
    "numbers": ("Gelu", ["x"], {}, 1),
    "a vector for all tokens": ("Add", ["x", "vector"], {}, 1),
    "a vector for each token": ("Mul", ["tokens", "x"], {}, 1),
    "a scalar": ("Mul", ["x", "half"], {}, 1),
    "both operands": ("Mul", ["x", "x"], {}, 1),
    "rows": ("LayerNormalization", ["x", "vector"], {"axis": -1}, 1),
    "probabilities": ("Softmax", ["x"], {"axis": -1}, 1),
    "columns of probabilities": ("Softmax", ["x"], {"axis": 2}, 1),
    "a linear": ("MatMul", ["x", "matrix"], {}, 1),
    "turned axes": ("Transpose", ["x"], {"perm": [2, 1, 0]}, 1),
    "the last of turned axes": ("Transpose", ["x"], {"perm": [0, 2, 1]}, 2),
    "heads": ("Reshape", ["x", "heads"], {}, 1),
}
STOPPED = {
    "a mean of all": ("LayerNormalization", ["x", "tokens"], {"axis": 1}, 1),
    "a sum over the axis": ("Softmax", ["x"], {"axis": 1}, 1),
    "columns of a product": ("MatMul", ["x", "matrix"], {}, 2),
    "an axis that is new": ("Reshape", ["x", "split"], {}, 2),
    "an axis that was joined": ("Reshape", ["x", "merged"], {}, 1),
}


@pytest.mark.parametrize("index", ["one", "last", "two"])
@pytest.mark.parametrize(("op", "given", "attributes", "axis"), PASSED.values(), ids=PASSED)
def test_what_works_on_each_token_alone_is_passed(op, given, attributes, axis, index):
    before = graph_of(
        (op, given, "a", attributes), ("Gather", ["a", index], "b", {"axis": axis}), ("Neg", ["b"], "y", {})
    )
    after = selected_early(before)
    same_function(before, after)
    assert after.graph.node[0].op_type == SELECTIONS[index == "two"]


@pytest.mark.parametrize(("op", "given", "attributes", "axis"), STOPPED.values(), ids=STOPPED)
def test_what_needs_the_others_is_not(op, given, attributes, axis):
    graph = graph_of(
        (op, given, "a", attributes), ("Gather", ["a", "one"], "b", {"axis": axis}), ("Neg", ["b"], "y", {})
    )
    assert selected_early(graph) is graph


@pytest.mark.parametrize(
    ("index", "nodes", "outputs"),
    [
        ("one", [("Neg", ["a"], "z", {})], ("y", "z")),
        ("one", [], ("y", "a")),
        ("order", [], ("y",)),
    ],
    ids=["another node reads all", "all are an output", "nothing is dropped"],
)
def test_a_selection_that_saves_nothing_stays(index, nodes, outputs):
    graph = graph_of(("Gelu", ["x"], "a", {}), ("Gather", ["a", index], "y", {"axis": 1}), *nodes, outputs=outputs)
    assert selected_early(graph) is graph


@pytest.mark.parametrize(
    ("nodes", "outputs"), [([("Neg", ["m"], "z", {})], ("y", "z")), ([], ("y", "m"))], ids=["a node", "the caller"]
)
def test_means_of_all_tokens_stay_where_somebody_reads_them(nodes, outputs):
    norm = ("LayerNormalization", ["x", "vector"], "a m", {})
    graph = graph_of(norm, ("Gather", ["a", "one"], "y", {"axis": 1}), *nodes, outputs=outputs)
    assert selected_early(graph) is graph


def test_means_that_nobody_reads_do_not_stop_a_selection():
    before = graph_of(("LayerNormalization", ["x", "vector"], "a m", {}), ("Gather", ["a", "one"], "y", {"axis": 1}))
    after = selected_early(before)
    same_function(before, after)
    assert after.graph.node[0].op_type == "Slice"


def test_a_graph_with_a_value_of_unknown_shape_is_left_as_it_is():
    graph = graph_of(
        ("Shape", ["x"], "sizes", {}),
        ("Shape", ["sizes"], "rank", {}),
        ("Slice", ["sizes", "first", "rank"], "shape", {}),
        ("Reshape", ["x", "shape"], "a", {}),
        ("Gather", ["a", "one"], "b", {"axis": 1}),
        ("Reshape", ["b", "rows"], "y", {}),
    )
    assert selected_early(graph) is graph


def test_a_selection_that_has_not_moved_is_written_as_it_was():
    before = graph_of(
        ("Gather", ["x", "first"], "a", {"axis": 1}),
        ("Gelu", ["x"], "b", {}),
        ("Gather", ["b", "one"], "c", {"axis": 1}),
        ("Add", ["a", "c"], "y", {}),
    )
    after = selected_early(before)
    same_function(before, after)
    assert sorted(node.op_type for node in after.graph.node if node.op_type in SELECTIONS) == ["Gather", "Slice"]
    assert "node_a" in {node.name for node in after.graph.node if node.op_type == "Gather"}


@pytest.mark.parametrize("index", ["one", "last", "two"])
def test_branches_of_a_residual_join_again(index):
    before = graph_of(
        ("Gelu", ["x"], "a", {}),
        ("LayerNormalization", ["a", "vector"], "b", {}),
        ("Tanh", ["b"], "c", {}),
        ("Add", ["a", "c"], "d", {}),
        ("Gather", ["d", index], "e", {"axis": 1}),
        ("Neg", ["e"], "y", {}),
    )
    after = selected_early(before)
    same_function(before, after)
    assert [node.op_type in SELECTIONS for node in after.graph.node] == [True] + [False] * (len(after.graph.node) - 1)


def rows_of_linears(path):
    """Tokens that each product by a constant matrix is computed for, in the order of the graph."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True).graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    return [shapes[node.output[0]][-2].dim_value for node in products]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [5] * 5 + [1] * 3),
        ({"qk_norm": True}, [5] * 5 + [1] * 3),
        pytest.param({"init_values": 0.5}, [5] * 5 + [1] * 3, marks=pytest.mark.slow),
        pytest.param({"reg_tokens": 2}, [7] * 5 + [1] * 3, marks=pytest.mark.slow),
        pytest.param({"global_pool": "avg"}, [5] * 8, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_classifier_computes_its_last_block_for_one_token(tmp_path, options, rows):
    model = dense_model(num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=2, **options)
    made = export_onnx(model.module, tmp_path / "x.onnx", input_size=(3, 32, 32), opset=20, metadata={}, simplify=False)
    assert rows_of_linears(tmp_path / "x.onnx") == rows
    assert ("Squeeze" in made.nodes_after) == (rows[-1] == 1)
