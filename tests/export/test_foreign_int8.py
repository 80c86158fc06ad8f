"""Kind: a verdict that a file gets without being the model. A cosine of outputs with a large mean says nothing of the weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader

from toolchain.export.agreement import blobs, parity_of
from toolchain.export.onnx_graph import export_onnx
from toolchain.parity import Tolerance, spread_error

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The fp32 file of a small ViT whose logits have a large mean."""
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    torch.nn.init.constant_(model.head.bias, 3.0)
    path = tmp_path_factory.mktemp("vit") / "fp32.onnx"
    export_onnx(model, path, input_size=SIZE, opset=18, metadata={}, simplify=True)
    return path


class Images(CalibrationDataReader):
    def __init__(self):
        self.left = list(np.split(blobs(SIZE, 64) + 0.3 * np.random.default_rng(2).standard_normal((64, *SIZE)), 4))

    def get_next(self):
        return {"image": self.left.pop().astype(np.float32)} if self.left else None


def dynamic(source, made):
    quantize_dynamic(source, made, weight_type=QuantType.QInt8)


def qdq(source, made):
    quantize_static(
        source,
        made,
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,  # processors without VNNI saturate at 8 bits
        op_types_to_quantize=["MatMul", "Gemm"],
        extra_options={"MatMulConstBOnly": True},
    )


@pytest.mark.slow
@pytest.mark.parametrize("tool", [dynamic, qdq])
def test_an_honest_file_passes_and_one_whose_weights_are_all_zero_fails(tool, vit, tmp_path):
    path = tmp_path / "int8.onnx"
    tool(vit, path)
    honest = parity_of(vit, path, "none").rung
    assert honest.verdict == "pass", honest
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, path)
    rung = parity_of(vit, path, "none").rung
    assert rung.verdict == ("not_run" if tool is qdq else "fail"), "fixed scales may be to blame on noise"
    assert ("name --data" in rung.reason) == (tool is qdq)
    assert "is constant, and that of fp32.onnx is not" in rung.reason, "the cosine alone lets it pass"
    asked = parity_of(vit, path, "none", Tolerance(None, 0.9, None)).rung
    assert (asked.verdict, asked.cosine_min > 0.9) == (rung.verdict, True), "no bound makes a constant the model"


def test_probabilities_of_opposite_logits_fail(tmp_path):
    weight = 0.01 * np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32)

    def softmax(path, values):
        nodes = [
            helper.make_node("Flatten", ["x"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["l"]),
            helper.make_node("Softmax", ["l"], ["p"], axis=1),
        ]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 4, 4])]
        outputs = [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["b", 5])]
        graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(values, "w")])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
        dynamic(path, path.with_suffix(".int8.onnx"))
        return path.with_suffix(".int8.onnx")

    right, opposite = softmax(tmp_path / "a.onnx", weight), softmax(tmp_path / "b.onnx", -weight)
    assert parity_of(tmp_path / "a.onnx", right, "none").rung.verdict == "pass"
    rung = parity_of(tmp_path / "a.onnx", opposite, "none").rung
    assert rung.verdict == "fail"
    assert rung.cosine_min > 0.95


def test_the_spread_error_is_one_at_the_mean_and_four_at_the_opposite():
    y = np.random.default_rng(0).standard_normal((16, 5)) + 100
    assert spread_error(y, y) == 0
    assert spread_error(y, np.broadcast_to(y.mean(axis=0), y.shape)) == pytest.approx(1)
    assert spread_error(y, 2 * y.mean(axis=0) - y) == pytest.approx(4)
