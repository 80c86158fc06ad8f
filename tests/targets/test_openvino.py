"""Settings are read back, shapes are the feeds', and the precision is the one that runs."""

import re
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from played.cpus import CPUS, play

from toolchain.artifacts import open_artifact
from toolchain.errors import RecipeError, TargetUnavailable
from toolchain.targets.openvino_cpu import OPENVINO_CPU, OPENVINO_CPU_BF16, OpenVinoRunner

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16")


def written(path, batch="batch", width=64):
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, width]) for name in ("image", "logits")]
    nodes = [helper.make_node("MatMul", ["image", "w"], ["h"]), helper.make_node("Relu", ["h"], ["logits"])]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path, weight


def precisions(runner):
    """Precision in which the products of the compiled model run → how many."""
    (request,) = runner._requests.values()
    found = Counter()
    for op in request.get_compiled_model().get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].astype(str) in ("FullyConnected", "MatMul"):
            found[info["runtimePrecision"].astype(str)] += 1
    return found


@pytest.mark.parametrize(
    ("target", "runs_in"), [(OPENVINO_CPU, "f32"), pytest.param(OPENVINO_CPU_BF16, "bf16", marks=needs_bf16)]
)
def test_the_products_run_in_the_precision_of_the_name(target, runs_in, tmp_path):
    path, weight = written(tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    expected = np.maximum(x @ weight, 0)
    with target.open(path, threads=1) as runner:
        got = runner.infer({"image": x})["logits"]
        assert precisions(runner) == {runs_in: 1}
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < 1e-5 if runs_in == "f32" else 1e-5 < error < 2e-2, "bf16 rounds, and visibly"


def test_a_precision_that_quietly_becomes_another_is_refused(tmp_path, monkeypatch):
    """OpenVINO takes the hint bf16 on a CPU without AVX-512, and runs f32; the probe alone is not relied on."""
    path, _ = written(tmp_path / "m.onnx")
    play(CPUS["avx2"], monkeypatch)
    with (
        OpenVinoRunner(path, 1, "bf16", target="openvino-cpu-bf16") as runner,
        pytest.raises(TargetUnavailable, match="INFERENCE_PRECISION_HINT = 'bf16' and runs with 'f32'"),
    ):
        runner.infer({"image": np.zeros((1, 64), np.float32)})


def test_more_threads_than_there_are_is_refused_and_not_quietly_fewer(tmp_path):
    path, _ = written(tmp_path / "m.onnx")
    with OPENVINO_CPU.open(path, 4096) as runner, pytest.raises(TargetUnavailable, match="INFERENCE_NUM_THREADS"):
        runner.infer({"image": np.zeros((1, 64), np.float32)})


def test_the_settings_of_a_session(tmp_path):
    path, _ = written(tmp_path / "m.onnx")
    with OPENVINO_CPU.open(path, threads=1) as runner:
        runner.infer({"image": np.zeros((1, 64), np.float32)})
        (request,) = runner._requests.values()
        compiled = request.get_compiled_model()
        found = [compiled.get_property(n) for n in ("NUM_STREAMS", "INFERENCE_NUM_THREADS", "PERFORMANCE_HINT")]
        assert found == [1, 1, "LATENCY"]
        assert compiled.inputs[0].partial_shape.is_static, "a dynamic batch would choose other kernels"


def test_a_fixed_batch_is_not_reshaped(tmp_path):
    """OpenVINO itself would: a file that was exported for one batch may hold that batch in its constants."""
    path, _ = written(tmp_path / "m.onnx", batch=2)
    with OPENVINO_CPU.open(path, threads=1) as runner:
        assert runner.infer({"image": np.zeros((2, 64), np.float32)})["logits"].shape == (2, 64)
        with pytest.raises(RecipeError, match=r"takes shape \[2,64\], got \[3, 64\]"):
            runner.infer({"image": np.zeros((3, 64), np.float32)})
        with pytest.raises(RecipeError, match="got nothing"):
            runner.infer({"picture": np.zeros((2, 64), np.float32)})


@pytest.mark.parametrize("names", [(), ("x",), ("x:0", "b", "x")])
@pytest.mark.parametrize("told", [True, False])
def test_files_of_others_are_called_by_names_that_need_not_be_there(names, told, tmp_path):
    """Kind: what OpenVINO converts from torch, whose outputs have no names, and from TensorFlow, where inputs have several."""
    from openvino import opset13

    path, x = tmp_path / "m.xml", np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    image = opset13.parameter([-1, 4], np.float32, name="node_x")
    model = ov.Model([opset13.relu(image)], [image], "m")
    model.inputs[0].get_tensor().set_names(set(names))
    model.outputs[0].get_tensor().set_names({f"{name}.out" for name in names})
    ov.save_model(model, path)
    if not told:  # as OpenVINO wrote it before it told the names of outputs beside them
        path.write_text(re.sub(r' output_names="[^"]*"', "", path.read_text()))
    (image,), (out,) = open_artifact(path).inputs, open_artifact(path).outputs
    assert image.name == min(names, default="node_x")
    with OPENVINO_CPU.open(path, threads=1) as runner:
        np.testing.assert_array_equal(runner.infer({image.name: x})[out.name], np.maximum(x, 0))
        assert len(runner.time_ns([{image.name: x}], 3)) == 3


def test_outputs_in_bf16_are_the_numbers_that_they_are(tmp_path):
    """Kind: bf16 files of other tools, whose bits were read as those of fp16: 1.793 for 0.6725."""
    path, x = tmp_path / "m.onnx", np.array([[0.6725, -0.3623, 300.0]], np.float32)
    kinds = {"image": TensorProto.FLOAT, "logits": TensorProto.BFLOAT16}
    io = [helper.make_tensor_value_info(name, kind, ["batch", 3]) for name, kind in kinds.items()]
    node = helper.make_node("Cast", ["image"], ["logits"], to=TensorProto.BFLOAT16)
    opset = helper.make_opsetid("", 20)
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", io[:1], io[1:]), opset_imports=[opset], ir_version=10), path
    )
    with OPENVINO_CPU.open(path, threads=1) as runner:
        np.testing.assert_allclose(runner.infer({"image": x})["logits"], x, rtol=2**-8)


def test_one_timing_has_one_shape(tmp_path):
    path, _ = written(tmp_path / "m.onnx")
    feeds = [{"image": np.zeros((batch, 64), np.float32)} for batch in (1, 2)]
    with OPENVINO_CPU.open(path, threads=1) as runner, pytest.raises(RecipeError, match="feeds of one shape"):
        runner.time_ns(feeds, 4)


def test_outside_its_block_a_runner_does_nothing(tmp_path):
    path, _ = written(tmp_path / "m.onnx")
    runner = OPENVINO_CPU.open(path, threads=1)
    with pytest.raises(RuntimeError, match="with"):
        runner.infer({"image": np.zeros((1, 64), np.float32)})


def test_a_cpu_without_bf16_says_so(monkeypatch):
    class NoBf16:
        def get_property(self, *_):
            return ["FP32", "INT8"]

    monkeypatch.setattr(ov, "Core", NoBf16)
    assert OPENVINO_CPU.probe().details["precision"] == "f32"
    with pytest.raises(TargetUnavailable, match=r"no bf16.*FP32, INT8"):
        OPENVINO_CPU_BF16.probe()


def test_an_openvino_without_its_cpu_plugin_says_so(monkeypatch):
    """Kind: conda and distributions, which package the plugin by itself."""

    class Bare:
        def get_property(self, *_):
            raise RuntimeError(
                'Exception from core.cpp:\nDevice with "CPU" name is not registered in the OpenVINO Runtime'
            )

    monkeypatch.setattr(ov, "Core", Bare)
    with pytest.raises(TargetUnavailable, match=r'no CPU plugin here: Device with "CPU" name is not registered'):
        OPENVINO_CPU.probe()


def test_without_openvino_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    for call in (OPENVINO_CPU.probe, lambda: OPENVINO_CPU.open(tmp_path / "m.onnx", 1)):
        with pytest.raises(TargetUnavailable) as caught:
            call()
        assert (caught.value.reason, caught.value.install) == (
            "the Python module openvino is not installed",
            "pip install 'slimvit[openvino]'",
        )
