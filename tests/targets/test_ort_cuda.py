"""What is refused, tested with ONNX Runtime's own words for a model on the CPU; the rest needs a GPU."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from builders import dense_model
from onnx import helper

from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.export.calls import torch_call
from toolchain.export.onnx_graph import export_onnx
from toolchain.targets import gpu, ort_cuda
from toolchain.targets.gpu import local_capability
from toolchain.targets.mode import EVERY_MODE
from toolchain.targets.ort_cuda import CPU, CUDA, ORT_CUDA, placed, require_cuda, torch_dtype

HERE = CUDA in ort.get_available_providers() and gpu.no_gpu() is None
WHY = "needs onnxruntime-gpu and an NVIDIA GPU"
API = {
    "InferenceSession": (
        *("get_providers", "get_inputs", "get_outputs", "io_binding", "run_with_iobinding"),
        "get_provider_graph_assignment_info",
    ),
    "IOBinding": ("bind_input", "bind_output"),
    "RunOptions": ("add_run_config_entry",),
    "SessionOptions": ("add_session_config_entry",),
}
"""Class of onnxruntime → what `OrtCudaRunner` calls on it."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model = dense_model()
    path = tmp_path_factory.mktemp("ort-cuda") / "tiny.onnx"
    export_onnx(model.module, path, input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
    return model, path


def on_the_cpu(path):
    """Where ONNX Runtime says that it runs the nodes of a file without a GPU."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return placed(ort.InferenceSession(str(path), options, providers=[CPU]))


def test_a_session_that_fell_back_to_the_cpu_is_refused(tiny):
    nodes = on_the_cpu(tiny[1])
    assert {op for _, op in nodes[CPU]} >= {"MatMul", "Gemm", "Conv", "Softmax"}
    with pytest.raises(TargetUnavailable, match="fell back to CPUExecutionProvider") as caught:
        require_cuda("ort-cuda", tiny[1], [CPU], nodes)
    assert "onnxruntime-gpu" in caught.value.install


def test_nodes_that_are_left_to_the_cpu_are_refused_though_the_provider_is_there(tiny):
    with pytest.raises(ArtifactError, match=r"nodes run on the CPU under ort-cuda: Conv node_conv2d"):
        require_cuda("ort-cuda", tiny[1], [CUDA, CPU], on_the_cpu(tiny[1]))


def test_a_single_product_on_the_cpu_is_found(tiny):
    every = on_the_cpu(tiny[1])[CPU]
    shapes = [(name, op) for name, op in every if op in ort_cuda.SHAPE_OPS]
    one = next((name, op) for name, op in every if op == "MatMul")
    rest = [node for node in every if node not in shapes and node != one]
    assert shapes
    require_cuda("ort-cuda", tiny[1], [CUDA, CPU], {CUDA: [*rest, one], CPU: shapes})
    with pytest.raises(ArtifactError, match=f"1 nodes run on the CPU .*MatMul {one[0]}"):
        require_cuda("ort-cuda", tiny[1], [CUDA, CPU], {CUDA: rest, CPU: [*shapes, one]})
    with pytest.raises(ArtifactError, match="no node runs on the GPU"):
        require_cuda("ort-cuda", tiny[1], [CUDA, CPU], {CPU: shapes})


def test_arithmetic_on_shapes_may_stay_on_the_cpu_and_the_same_on_values_may_not(tmp_path):
    int64, float32 = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    io = [helper.make_tensor_value_info("x", float32, [2, 3]), helper.make_tensor_value_info("y", float32, [2, 3])]
    size = helper.make_tensor_value_info("size", int64, [2])
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], name="shape"),
        helper.make_node("Mul", ["s", "s"], ["size"], name="of shapes"),
        helper.make_node("Mul", ["x", "x"], ["y"], name="of values"),
    ]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", io[:1], [io[1], size])), path)
    require_cuda("ort-cuda", path, [CUDA], {CUDA: [("of values", "Mul")], CPU: [("of shapes", "Mul")]})
    with pytest.raises(ArtifactError, match="Mul of values"):
        require_cuda("ort-cuda", path, [CUDA], {CUDA: [("of shapes", "Mul")], CPU: [("of values", "Mul")]})


@pytest.mark.parametrize("kind", ["DOUBLE", "INT8", "FLOAT"])
def test_a_value_on_the_cpu_is_none_of_a_shape_whatever_it_is_called_and_holds(tmp_path, kind):
    """Kind: a file whose nodes have no names, or that computes in fp64, of which the CPU's share went unseen."""
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind), [2, 3]) for name in ("x", "y")]
    size = helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [2])
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Neg", ["s"], ["size"]),
        helper.make_node("Abs", ["x"], ["y"]),
    ]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", io[:1], [io[1], size])), path)
    require_cuda("ort-cuda", path, [CUDA], {CUDA: [("", "Abs")], CPU: [("", "Neg"), ("", "Shape")]})
    with pytest.raises(ArtifactError, match="1 nodes run on the CPU under ort-cuda: Abs"):
        require_cuda("ort-cuda", path, [CUDA], {CUDA: [("", "Neg")], CPU: [("", "Abs")]})


@pytest.mark.skipif(HERE, reason="it runs here")
def test_without_cuda_the_target_says_what_is_missing():
    with pytest.raises(TargetUnavailable) as caught:
        ORT_CUDA.probe()
    assert "without CUDA" in caught.value.reason or "GPU" in caught.value.reason


def test_every_api_name_exists_in_the_installed_module():
    for owner, names in API.items():
        for name in names:
            assert hasattr(getattr(ort, owner), name), f"{owner}.{name}"


def test_torch_and_onnx_mean_the_same_types():
    for name in ("float", "float16", "double", "int8", "uint8", "int32", "int64", "bool"):
        number = onnx.TensorProto.DataType.Value(name.upper())
        array = torch.zeros(1, dtype=torch_dtype(f"tensor({name})")).numpy()
        assert helper.tensor_dtype_to_np_dtype(number) == array.dtype
    assert torch_dtype("tensor(bfloat16)") == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason=WHY)
@pytest.mark.parametrize("mode", EVERY_MODE, ids=lambda mode: mode.suffix or "plain")
def test_a_model_runs_on_the_gpu_in_every_mode(mode, tiny):
    model, path = tiny
    assert local_capability() in ORT_CUDA.probe().device
    with ORT_CUDA.in_mode(mode).open(path, threads=1) as runner:
        assert placed(runner._session)[CUDA]
        feeds = [
            {"image": np.random.default_rng(seed).standard_normal((3, 3, 32, 32)).astype(np.float32)} for seed in (0, 1)
        ]
        expected = [torch_call(model.module)(feed["image"]) for feed in feeds]
        np.testing.assert_allclose(runner.infer(feeds[0])["logits"], expected[0], atol=1e-4)
        assert runner.device_bytes() > 0
        assert min(runner.time_ns(feeds, 10)) > 0
        for (_, call), wanted in zip(runner._calls.values(), expected, strict=True):
            np.testing.assert_allclose(call.launched.outputs["logits"].cpu().numpy(), wanted, atol=1e-4)
