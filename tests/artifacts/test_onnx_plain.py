"""The fp32 graph of a file has the file's numbers, whatever their type, and what it is not sure of is refused."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

from toolchain.artifacts.onnx_plain import plain
from toolchain.errors import ArtifactError
from toolchain.export.precision import PRECISIONS

DATA = Path(__file__).parents[1] / "targets/litert"
IMAGES = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)


def fp32():
    return onnx.load(DATA / "tiny.fp32.onnx")


def int8():
    return onnx.load(DATA / "tiny.int8-dynamic.onnx")


def run(model):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"image": IMAGES}
    )[0]


@pytest.mark.parametrize(
    ("precision", "bound"), [("fp32", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2), ("int8-dynamic", 2e-2)]
)
def test_it_computes_what_the_file_does_but_for_the_rounding_of_activations(precision, bound):
    model = fp32() if precision == "fp32" else PRECISIONS[precision].convert(fp32(), IMAGES).model
    made = plain(model).model
    onnx.checker.check_model(made)
    assert {each.data_type for each in made.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    expected = run(fp32() if precision == "bf16" else model)  # ONNX Runtime's CPU has no bf16
    assert np.abs(run(made) - expected).max() <= bound * max(1.0, np.abs(expected).max())
    assert [each.name for each in made.graph.input] == ["image"]
    assert model.graph.node, "what was given stays as it is"


def test_int8_weights_are_their_codes_times_their_scales():
    model = int8()
    stored = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    content = plain(model)
    weights = {each.name: numpy_helper.to_array(each) for each in content.model.graph.initializer}
    assert len(content.codes) == 4
    for name, codes in content.codes.items():
        np.testing.assert_array_equal(codes.codes, stored[f"{name}_quantized"])
        np.testing.assert_array_equal(weights[name], codes.codes.astype(np.float32) * stored[f"{name}_scale"])
    assert not {node.op_type for node in content.model.graph.node} & {"MatMulInteger", "DynamicQuantizeLinear"}
    assert not [name for name in weights if name.endswith(("_quantized", "_zero_point"))]


def test_halves_are_named():
    content = plain(PRECISIONS["fp16"].convert(fp32(), IMAGES).model)
    assert "head.weight" in content.halves
    assert "norm.weight" not in content.halves, "norms stay in fp32"


def zero_points(model):
    next(each for each in model.graph.initializer if each.name.endswith("_zero_point")).raw_data = b"\1" * 48


def other_scales(model):
    (first, second) = [each for each in model.graph.node if each.op_type == "DynamicQuantizeLinear"][:2]
    scaled = next(each for each in model.graph.node if each.op_type == "Mul" and first.output[1] in each.input)
    scaled.input[0] = second.output[1]


def no_cast(model):
    cast = next(each for each in model.graph.node if each.op_type == "Cast")
    cast.op_type = "Identity"


def computed_weight(model):
    node = next(each for each in model.graph.node if each.op_type == "MatMulInteger")
    node.input[1] = "elsewhere"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (zero_points, "has zero points"),
        (other_scales, "are not those of what it multiplies"),
        (no_cast, "should be read by one Cast"),
        (computed_weight, "is no stored int8 matrix"),
    ],
)
def test_what_is_not_the_quantisers_own_is_refused(fault, words):
    model = int8()
    fault(model)
    with pytest.raises(ArtifactError, match=words):
        plain(model)
