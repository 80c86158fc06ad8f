"""Kind: files whose precision their metadata does not say, or says wrongly. It is read from the graph, whoever wrote it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import write_classifier
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.transformers.float16 import convert_float_to_float16

from toolchain.artifacts.onnx_file import FP32, PRECISION, OnnxFile
from toolchain.artifacts.onnx_types import graph_precision, weight_types
from toolchain.export.precision import PRECISIONS, tolerance_of

F, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
W = np.random.default_rng(0).standard_normal((48, 32)).astype(np.float32)


def graph(nodes, tensors, *, kind=F, functions=(), opset=21):
    """x [batch, 48] → y [batch, 32]."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", 48])],
        [helper.make_tensor_value_info("y", kind, ["batch", 32])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("own", 1)]
    return helper.make_model(made, opset_imports=opsets, functions=functions, ir_version=10)


def product(weight="w"):
    return helper.make_node("MatMul", ["x", weight], ["y"])


def cast(source, target, kind):
    return helper.make_node("Cast", [source], [target], to=kind)


STEP = {"s": np.float32(0.1), "z": np.uint8(128)}
Q = (W * 10).clip(-8, 7)
FUNCTION = helper.make_function(
    "own", "Linear", ["a", "b"], ["c"], [helper.make_node("MatMul", ["a", "b"], ["c"])], [helper.make_opsetid("", 21)]
)
CASES = {
    "stored in fp32": ("fp32", graph([product()], {"w": W})),
    "stored in fp16": ("fp16", graph([product()], {"w": W.astype(np.float16)}, kind=F16)),
    "stored in bf16": ("bf16", graph([product()], {"w": W.astype(ml_dtypes.bfloat16)}, kind=BF16)),
    "stored in fp64": ("fp64", graph([product()], {"w": W.astype(np.float64)}, kind=TensorProto.DOUBLE)),
    "stored in fp16, computed in fp32": ("fp16", graph([cast("h", "w", F), product()], {"h": W.astype(np.float16)})),
    "stored in fp32, rounded by a cast": (
        "fp16",
        graph([cast("f", "h", F16), cast("h", "w", F), product()], {"f": W}),
    ),
    "a constant node": (
        "fp16",
        graph(
            [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W.astype(np.float16))), product()],
            {},
            kind=F16,
        ),
    ),
    "uint8, per tensor, behind a transpose": (
        "int8",
        graph(
            [
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                helper.make_node("Transpose", ["d"], ["w"]),
                product(),
            ],
            {"q": (Q + 128).astype(np.uint8).T, **STEP},
        ),
    ),
    "int4": (
        "int4",
        graph(
            [helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), product()],
            {"q": Q.astype(ml_dtypes.int4), "s": np.float32(0.1)},
        ),
    ),
    "fp8": (
        "fp8",
        graph(
            [helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), product()],
            {"q": Q.astype(ml_dtypes.float8_e4m3fn), "s": np.float32(0.1)},
        ),
    ),
    "fp32 rounded by Q and DQ": (
        "int8",
        graph(
            [
                helper.make_node("QuantizeLinear", ["f", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]),
                product(),
            ],
            {"f": W, **STEP},
        ),
    ),
    "dequantised by hand": (
        "int8",
        graph(
            [cast("q", "f", F), helper.make_node("Mul", ["f", "s"], ["w"]), product()],
            {"q": Q.astype(np.int8), "s": np.float32(0.1)},
        ),
    ),
    "inside a function": (
        "fp16",
        graph(
            [helper.make_node("Linear", ["x", "w"], ["y"], domain="own")],
            {"w": W.astype(np.float16)},
            kind=F16,
            functions=[FUNCTION],
        ),
    ),
    "activations rounded, weights not": (
        "int8",
        graph(
            [
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                helper.make_node("MatMul", ["d", "w"], ["y"]),
            ],
            {"w": W, **STEP},
        ),
    ),
    "linears as fp32 islands": (
        "fp16",
        graph(
            [product(), cast("y", "h", F16), helper.make_node("Relu", ["h"], ["r"])],
            {"w": W},
        ),
    ),
    "a position table in int8, added to activations": (
        "fp32",
        graph(
            [
                helper.make_node("DequantizeLinear", ["p", "s"], ["d"]),
                helper.make_node("Add", ["x", "d"], ["a"]),
                helper.make_node("MatMul", ["a", "w"], ["y"]),
            ],
            {"p": np.ones((1, 48), np.int8), "s": np.float32(0.1), "w": W},
        ),
    ),
    "a bias in int8": (
        "fp32",
        graph(
            [
                helper.make_node("DequantizeLinear", ["b", "s"], ["d"]),
                helper.make_node("Gemm", ["x", "w", "d"], ["y"]),
            ],
            {"b": np.ones((1, 32), np.int8), "s": np.float32(0.1), "w": W},
        ),
    ),
    "no weights": ("", graph([helper.make_node("Relu", ["x"], ["y"])], {})),
}


@pytest.mark.parametrize("case", CASES)
def test_the_precision_is_that_of_the_graph(case):
    name, model = CASES[case]
    found, reason = graph_precision(model)
    assert found == name, reason
    assert reason


def node(kind, *inputs, **attributes):
    return helper.make_node(kind, list(inputs), ["made"], **attributes)


WAYS = {
    "sliced": ([node("Slice", "d", "from", "to")], {"from": np.array([0, 0]), "to": np.array([48, 32])}),
    "split": ([helper.make_node("Split", ["d"], ["made", "rest"], axis=1, num_outputs=2)], {}),
    "joined": ([node("Concat", "d", "d", axis=1)], {}),
    "chosen": ([node("Where", "c", "d", "d")], {"c": np.array([True])}),
    "clipped": ([node("Clip", "d")], {}),
    "gathered": ([node("Gather", "d", "order", axis=1)], {"order": np.arange(32)}),
    "a product of two": ([node("MatMul", "d", "turn")], {"turn": np.eye(32, dtype=np.float32)}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", [False, True])
def test_weights_are_known_whatever_is_done_to_them_on_their_way(way, row):
    """Kind: a reading that knows some operators and takes the rest for something else."""
    nodes, tensors = WAYS[way]
    source = "row" if row else "d"
    dequantised = [helper.make_node("DequantizeLinear", ["q", "s"], [source])]
    reshaped = [helper.make_node("Reshape", ["row", "shape"], ["d"])] if row else []
    held = {"q": Q.astype(np.int8).ravel() if row else Q.astype(np.int8), "s": np.float32(0.1), **tensors}
    held |= {"shape": np.array([48, 32])} if row else {}
    model = graph([*dequantised, *reshaped, *nodes, product("made")], held)
    assert graph_precision(model) == ("int8", "1 of 1 linears and convolutions hold int8 weights")


def test_a_product_whose_weights_are_of_no_known_type_is_told():
    nodes = [cast("i", "c", F), product("c"), helper.make_node("MatMul", ["x", "w"], ["z"])]
    model = graph(nodes, {"i": Q.astype(np.int32), "w": W})
    assert graph_precision(model) == (
        "fp32",
        "1 of 1 linears and convolutions hold fp32 weights; 1 product not recognised",
    )


def test_a_graph_of_many_shared_values_is_read_at_once():
    """Kind: work that doubles with each node. It would not end."""
    nodes = [helper.make_node("Mul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(300)]
    model = graph([*nodes, product("m300")], {"m0": W.astype(np.float16)}, kind=F16)
    assert graph_precision(model)[0] == "fp16"


class Images(CalibrationDataReader):
    def __init__(self):
        self.left = [{"image": np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)}]

    def get_next(self):
        return self.left.pop() if self.left else None


def dynamic(source, made):
    quantize_dynamic(source, made, weight_type=QuantType.QUInt8)


def qdq(source, made):
    quantize_static(source, made, Images(), quant_format=QuantFormat.QDQ)


def operators(source, made):
    quantize_static(source, made, Images(), quant_format=QuantFormat.QOperator)


def four_bits(source, made):
    tool = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=16)
    tool.process()
    onnx.save(tool.model.model, made)


def half(source, made):
    onnx.save(convert_float_to_float16(onnx.load(source)), made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tool", "name"), [(dynamic, "int8"), (qdq, "int8"), (operators, "int8"), (four_bits, "int4"), (half, "fp16")]
)
def test_what_onnxruntimes_own_tools_make_is_known(tool, name, tmp_path):
    source = write_classifier(tmp_path / "fp32.onnx")
    model = onnx.load(source)
    for node in model.graph.node:  # four bits are for MatMul alone
        if node.op_type == "Gemm":
            node.op_type, bias = "MatMul", node.input.pop()
    model.graph.initializer.remove(next(each for each in model.graph.initializer if each.name == bias))
    onnx.save(model, source)
    tool(source, tmp_path / "made.onnx")
    found = OnnxFile(tmp_path / "made.onnx").precision
    assert found.name == name
    assert OnnxFile(source).own_precision == FP32
    assert OnnxFile(tmp_path / "made.onnx").own_precision == "", "its metadata is left over from the fp32 file"


def test_metadata_that_contradicts_the_graph_is_told_and_not_believed(tmp_path):
    path = write_classifier(tmp_path / "a.onnx")
    assert (OnnxFile(path).precision.name, OnnxFile(path).precision.reason) == ("fp32", "")
    model = onnx.load(path)
    model.metadata_props.add(key=PRECISION, value="int8-qdq")
    onnx.save(model, path)
    found = OnnxFile(path).precision
    assert found.name == "fp32", "so that int8's loose bound is not had by an entry of the metadata"
    assert "1 of 1 linears" in found.reason
    assert "its metadata says int8-qdq" in found.reason


def test_every_weight_counts(tmp_path):
    other = W.astype(np.float16).astype(np.float32).T.copy()
    model = graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            cast("b", "c", F),
            helper.make_node("MatMul", ["h", "c"], ["i"]),
            helper.make_node("MatMul", ["i", "a"], ["y"]),
        ],
        {"a": W, "b": other.astype(np.float16)},
    )
    assert weight_types(model) == {"fp32": 2, "fp16": 1}
    assert graph_precision(model) == ("fp16", "1 of 3 linears and convolutions hold fp16 weights")


def test_what_was_never_measured_has_no_tolerance(tmp_path):
    tolerances = {}
    for case, (name, model) in CASES.items():
        onnx.save(model, tmp_path / "a.onnx")
        tolerances[name, case] = tolerance_of(OnnxFile(tmp_path / "a.onnx").precision)
    for (name, _), tolerance in tolerances.items():
        if name in ("fp8", ""):
            assert tolerance is None
        else:
            known = {"fp32": 0.99999, "fp64": 0.99999, "int8": PRECISIONS["int8-qdq"].tolerance.cosine_min}
            wanted = known[name] if name in known else PRECISIONS[name].tolerance.cosine_min
            assert tolerance is not None
            assert tolerance.cosine_min == wanted
