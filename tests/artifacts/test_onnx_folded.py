"""Folding changes nothing that a graph computes, and int8 codes stay integers of known signs."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.artifacts.onnx_folded import folded
from toolchain.artifacts.onnx_plain import Codes, Plain, plain

INT8 = Path(__file__).parents[1] / "targets/litert/tiny.int8-dynamic.onnx"
SEEDS = range(4)


def graph(nodes, stored, outputs=("y",)):
    """A graph of an input `x` [batch, 5, 6]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 5, 6])
    made = helper.make_graph([helper.make_node(*node) for node in nodes], "g", [image], values, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, batch=3):
    x = np.random.default_rng(9).standard_normal((batch, 5, 6)).astype(np.float32)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})


def same(before, after):
    for batch in (1, 3):
        for ours, theirs in zip(run(after, batch), run(before, batch), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def stored(model):
    return {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}


def operators(model):
    return [node.op_type for node in model.graph.node]


def factor(seed):
    """Positive and negative numbers, a zero, and one that leaves no scale."""
    values = np.random.default_rng(seed).standard_normal(8).astype(np.float32)
    values[:4] = 0.5, -0.25, 0.0, -1e-38
    return values


SCALED = [
    ("Reshape", ["x", "rows"], ["flat"]),
    ("MatMul", ["flat", "w"], ["product"]),
    ("Add", ["b", "product"], ["linear"]),
    ("Reshape", ["linear", "back"], ["shaped"]),
    ("Mul", ["gamma", "shaped"], ["scaled"]),
    ("Softmax", ["scaled"], ["y"]),
]


def scaled(seed, weight):
    return graph(
        SCALED,
        {
            "rows": np.array([-1, 6]),
            "back": np.array([-1, 5, 8]),
            "w": weight,
            "b": np.random.default_rng(seed + 50).standard_normal(8).astype(np.float32),
            "gamma": factor(seed),
        },
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_stay_integers_and_change_their_sign_alone(seed):
    generator = np.random.default_rng(seed)
    codes = Codes(
        generator.integers(-127, 128, (6, 8)).astype(np.int8), generator.uniform(0.001, 0.01, 8).astype(np.float32)
    )
    before = scaled(seed, codes.weight)
    after = folded(Plain(before, {"w": codes}, frozenset()))
    same(before, after.model)
    assert "Mul" not in operators(after.model)
    assert "gamma" not in stored(after.model)
    gamma, got = factor(seed), after.codes["w"]
    sign = np.where(np.abs(gamma) < 1e-30, 0, np.sign(gamma)).astype(np.int8)
    assert got.codes.dtype == np.int8
    np.testing.assert_array_equal(got.codes, codes.codes * sign)
    kept = sign != 0
    np.testing.assert_array_equal(got.scales[kept], (codes.scales * np.abs(gamma))[kept])
    np.testing.assert_array_equal(got.scales[~kept], codes.scales[~kept])
    np.testing.assert_array_equal(stored(after.model)["w"], got.weight)


def test_the_one_code_without_a_counterpart_leaves_its_linear_as_it_is():
    codes = Codes(np.full((6, 8), -128, np.int8), np.full(8, 0.01, np.float32))
    before = scaled(0, codes.weight)
    after = folded(Plain(before, {"w": codes}, frozenset()))
    assert after.codes["w"] is codes
    assert operators(after.model) == operators(before)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_gemm_takes_its_factor(seed, turned):
    weight = np.random.default_rng(seed).standard_normal((8, 6) if turned else (6, 8)).astype(np.float32)
    before = graph(
        [
            ("Reshape", ["x", "rows"], ["flat"]),
            ("Gemm", ["flat", "w", "b"], ["linear"]),
            ("Mul", ["linear", "gamma"], ["y"]),
        ],
        {
            "rows": np.array([-1, 6]),
            "w": weight,
            "b": np.arange(8, dtype=np.float32),
            "gamma": factor(seed),
        },
    )
    before.graph.node[1].attribute.append(helper.make_attribute("transB", int(turned)))
    after = folded(Plain(before, {}, frozenset({"w"})))
    same(before, after.model)
    assert operators(after.model) == ["Reshape", "Gemm"]
    assert after.halves == {"w"}
    assert before.graph.node[2].op_type == "Mul", "what was given stays as it is"


def read_twice(nodes, arrays):
    nodes.append(("Neg", ["linear"], ["other"]))
    return ("y", "other")


def shared_weight(nodes, arrays):
    nodes.append(("MatMul", ["flat", "w"], ["other"]))
    return ("y", "other")


def is_an_output(nodes, arrays):
    return ("y", "linear")


def other_axis(nodes, arrays):
    arrays["back"] = np.array([-1, 8, 5])
    arrays["gamma"] = np.arange(5, dtype=np.float32)
    return ("y",)


def split_rows(nodes, arrays):
    arrays["back"] = np.array([-1, 5, 4, 2])
    arrays["gamma"] = np.arange(2, dtype=np.float32)
    return ("y",)


def computed_factor(nodes, arrays):
    nodes.insert(0, ("Abs", ["gamma"], ["absolute"]))
    nodes[5] = ("Mul", ["absolute", "shaped"], ["scaled"])
    return ("y",)


@pytest.mark.parametrize("change", [read_twice, shared_weight, is_an_output, other_axis, split_rows, computed_factor])
def test_what_is_read_elsewhere_or_lies_otherwise_is_left(change):
    nodes, arrays = [*SCALED], stored(scaled(1, np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)))
    outputs = change(nodes, arrays)
    before = graph(nodes, arrays, outputs)
    after = folded(Plain(before, {}, frozenset()))
    same(before, after.model)
    assert operators(after.model) == operators(before)


@pytest.mark.parametrize("outer", [6, 8])
def test_a_linear_of_a_constant_becomes_one(outer):
    """As the query of an attention pool: repeated for a batch whose size the image has."""
    generator = np.random.default_rng(outer)
    before = graph(
        [
            ("Shape", ["x"], ["shape"]),
            ("Gather", ["shape", "first"], ["batch"]),
            ("Concat", ["batch", "one", "one"], ["times"]),
            ("Expand", ["latent", "times"], ["repeated"]),
            ("Reshape", ["repeated", "rows"], ["flat"]),
            ("MatMul", ["flat", "w"], ["product"]),
            ("Add", ["product", "b"], ["linear"]),
            ("Reshape", ["linear", "back"], ["y"]),
        ],
        {
            "first": np.array([0]),
            "one": np.array([1]),
            "latent": generator.standard_normal((1, 2, 6)).astype(np.float32),
            "rows": np.array([-1, 6]),
            "w": generator.standard_normal((6, outer)).astype(np.float32),
            "b": generator.standard_normal(outer).astype(np.float32),
            "back": np.array([-1, 2, outer]),
        },
    )
    before.graph.node[2].attribute.append(helper.make_attribute("axis", 0))
    codes = Codes(np.zeros((6, outer), np.int8), np.ones(outer, np.float32))
    after = folded(Plain(before, {"w": codes}, frozenset({"w"})))
    same(before, after.model)
    assert not {"MatMul", "Add"} & {*operators(after.model)}
    assert not {"w", "b"} & stored(after.model).keys()
    assert not after.codes
    assert not after.halves


def test_a_file_without_such_constants_stays_as_it_is():
    content = plain(onnx.load(INT8))
    after = folded(content)
    assert after.model == content.model
    assert after.codes == content.codes
