"""Every operator against ONNX's own reference, with inputs that tell variants apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from test_interpreter import graph_of

from toolchain.interpreter import module_of
from toolchain.interpreter.operators import OPERATORS
from toolchain.targets.executorch.operators import REWRITES

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


X, Y, SQUARE = floats(2, 3, 4), floats(2, 3, 4), floats(1, 4, 6, 6)
BITS, MORE = X > 0, Y > 0
POSITIVE = np.abs(X) + 0.1
UNARY = (
    "Abs",
    "Ceil",
    "Cos",
    "Erf",
    "Exp",
    "Floor",
    "Identity",
    "Neg",
    "Relu",
    "Sigmoid",
    "Sign",
    "Sin",
    "Softplus",
    "Tanh",
)
BINARY = ("Add", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Sub", "Sum", "Div")
REDUCED = [name for name in OPERATORS if name.startswith("Reduce")]
# (operator, attributes, inputs); integers are constants of the file, other inputs are fed.
CASES = [
    *[(name, {}, (X,)) for name in UNARY],
    *[(name, {}, (X, Y[:1])) for name in BINARY],
    *[(name, {}, (POSITIVE,)) for name in ("Log", "Sqrt", "Reciprocal")],
    *[(name, {"keepdims": keep}, (X, ints(-1, 0))) for name in REDUCED for keep in (0, 1)],
    *[(name, {}, (X,)) for name in REDUCED],
    ("ReduceMean", {"noop_with_empty_axes": 1}, (X,)),
    ("Pow", {}, (POSITIVE, Y)),
    *[("Pow", {}, (POSITIVE, np.float32(exponent))) for exponent in (2, 0.5)],
    ("Not", {}, (BITS,)),
    ("And", {}, (BITS, MORE)),
    ("Or", {}, (BITS, MORE)),
    ("Where", {}, (BITS, X, Y)),
    ("Gelu", {}, (X,)),
    ("Gelu", {"approximate": "tanh"}, (X,)),
    ("Softmax", {}, (X,)),
    ("Softmax", {"axis": 1}, (X,)),
    ("LayerNormalization", {"epsilon": 1e-2}, (X, floats(4), floats(4))),
    ("LayerNormalization", {"axis": 1}, (X, floats(3, 4))),
    ("RMSNormalization", {"epsilon": 1e-2}, (X, floats(4))),
    ("InstanceNormalization", {"epsilon": 1e-2}, (SQUARE, floats(4), floats(4))),
    ("BatchNormalization", {"epsilon": 1e-2}, (SQUARE, floats(4), floats(4), floats(4), np.abs(floats(4)))),
    ("MatMul", {}, (X, floats(2, 4, 5))),
    ("Gemm", {"alpha": 0.5, "beta": 2.0, "transA": 1}, (floats(4, 3), floats(4, 5), floats(5))),
    ("Gemm", {"transB": 1}, (floats(3, 4), floats(5, 4))),
    ("Conv", {"strides": [2, 2], "pads": [1, 0, 2, 1]}, (SQUARE, floats(3, 4, 3, 3), floats(3))),
    ("Conv", {"group": 2, "dilations": [2, 1]}, (SQUARE, floats(6, 2, 3, 3))),
    ("Conv", {"pads": [1, 2]}, (floats(1, 2, 7), floats(3, 2, 3))),
    ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 1]}, (SQUARE,)),
    ("GlobalAveragePool", {}, (SQUARE,)),
    ("Reshape", {}, (X, ints(0, -1, 2))),
    ("Reshape", {"allowzero": 1}, (floats(0, 3), ints(3, 0))),
    ("Flatten", {"axis": 2}, (X,)),
    ("Flatten", {"axis": -2}, (X,)),
    ("Transpose", {}, (X,)),
    ("Transpose", {"perm": [1, 2, 0]}, (X,)),
    ("Concat", {"axis": -1}, (X, Y, X)),
    ("Slice", {}, (X, ints(1, -3), ints(99, -1), ints(1, 2), ints(1, 2))),
    ("Slice", {}, (X, ints(-1), ints(-99), ints(2), ints(-1))),
    ("Slice", {}, (X, ints(3, 2), ints(0, 0), ints(2, 1), ints(-2, -1))),
    ("Slice", {}, (X, ints(0, 1), ints(2, 3))),
    *[("Slice", {}, (X, ints(start), ints(end), ints(-1), ints(2))) for start, end in ((0, 99), (1, 4), (1, 3))],
    ("Slice", {}, (X, ints(1, 0), ints(99, 99), ints(1, 2), ints(1, 2))),
    ("Gather", {"axis": 1}, (X, ints(2, 0, -1))),
    ("Gather", {"axis": -1}, (X, np.array(1))),
    ("Gather", {}, (X, np.array([[0, 1], [1, 0]]))),
    ("GatherElements", {"axis": 1}, (X, np.array([[[0, -1, 2, 1]], [[1, 1, 0, -3]]]))),
    ("Unsqueeze", {}, (X, ints(0, -1))),
    ("Squeeze", {}, (floats(1, 3, 1), ints(-1))),
    ("Squeeze", {}, (floats(1, 3, 1),)),
    ("Expand", {}, (floats(3, 1), ints(2, 1, 4))),
    ("Tile", {}, (X, ints(1, 2, 3))),
    ("Cast", {"to": TensorProto.INT64}, (X,)),
    ("Cast", {"to": TensorProto.FLOAT16}, (X,)),
    ("Clip", {}, (X, np.float32(-0.5), np.float32(0.5))),
    ("Clip", {}, (X, None, np.float32(0.5))),
    ("Clip", {}, (X, np.float32(0), np.float32(np.inf))),
    ("Pad", {}, (X, ints(0, 1, 2, 0, 0, 1), np.float32(3.0))),
    ("Pad", {}, (X, ints(1, 2), None, ints(2))),
    ("Shape", {"start": 1}, (X,)),
]
SPLITS = [({"axis": -1}, (X, ints(1, 3)), 2), ({"axis": 1, "num_outputs": 2}, (X,), 2)]
KNOWN = ("ConstantOfShape", "Range", "Size")


def require_same(operator, attributes, inputs, outputs=("y",), opset=20, operators=OPERATORS):
    names = [f"i{index}" if value is not None else "" for index, value in enumerate(inputs)]
    given = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    constants = {name: value for name, value in given.items() if value.dtype == np.int64 or value.ndim == 0}
    fed = tuple(name for name in given if name not in constants)
    model = graph_of(
        helper.make_node(operator, names, list(outputs), **attributes), constants=constants, inputs=fed, outputs=outputs
    )
    model.opset_import[0].version = 23 if operator == "RMSNormalization" else opset
    for value in model.graph.input:
        value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(given[value.name].dtype)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    expected = ReferenceEvaluator(model).run(None, {name: given[name] for name in fed})
    found = module_of(model, operators)(*(torch.from_numpy(given[name]) for name in fed))
    for mine, theirs in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.numpy().dtype == theirs.dtype
        assert np.allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs"), CASES, ids=[f"{n}-{name}" for n, (name, _, _) in enumerate(CASES)]
)
def test_it_is_the_reference(operator, attributes, inputs):
    require_same(operator, attributes, inputs)


@pytest.mark.parametrize(("attributes", "inputs", "count"), SPLITS)
@pytest.mark.parametrize("operators", [OPERATORS, {**OPERATORS, **REWRITES}], ids=["own", "executorch"])
def test_a_split_is_the_reference(attributes, inputs, count, operators):
    require_same("Split", attributes, inputs, tuple(f"y{index}" for index in range(count)), operators=operators)


@pytest.mark.parametrize(("operator", "attributes", "inputs"), [case for case in CASES if case[0] in REWRITES])
def test_another_form_of_it_for_a_converter_is_the_reference(operator, attributes, inputs):
    require_same(operator, attributes, inputs, operators={**OPERATORS, **REWRITES})


def test_every_operator_is_held_against_the_reference():
    assert {*OPERATORS} - {name for name, _, _ in CASES} == {"Split", *KNOWN}


def test_integers_are_divided_towards_zero():
    model = graph_of(
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.INT64),
        helper.make_node("Div", ["a", "two"], ["y"]),
        constants={"two": ints(2)},
    )
    assert module_of(model)(torch.tensor([-3.0, 3.0, -4.0])).tolist() == [-1, 1, -2]


def test_sizes_that_follow_from_shapes_are_known_before_a_call():
    """ConstantOfShape, Range and Size of shapes, at every batch, and refused of what an image shows."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Size", ["shape"], ["rank"]),
        helper.make_node("Range", ["zero", "rank", "one"], ["numbers"]),
        helper.make_node("Cast", ["numbers"], ["added"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["zeros", "added"], ["a"]),
        helper.make_node("Add", ["a", "x"], ["y"]),
    ]
    module = module_of(graph_of(*nodes, constants={"zero": np.array(0), "one": np.array(1)}))
    for batch in (1, 3):
        x = torch.randn(batch, 2)
        assert torch.allclose(module(x), x + torch.arange(2.0))
