"""Engines are really built; what needs a GPU is said to be missing and never made up."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
import os
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper
from targets.tensorrt_api import API, API_AHEAD_OF_TIME
from tensorrt_names import RECORD

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.convert import Convert
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.probabilities import with_probabilities
from toolchain.model import run_stage
from toolchain.targets import gpu
from toolchain.targets.base import BuildOptions, EngineBuild
from toolchain.targets.engine_cache import cached_engine
from toolchain.targets.engine_facts import source_digests
from toolchain.targets.mode import EVERY_MODE, Mode
from toolchain.targets.tensorrt import (
    network as trt_network,
)
from toolchain.targets.tensorrt import (
    options as trt_options,
)
from toolchain.targets.tensorrt import (
    runner as trt_runner,
)
from toolchain.targets.tensorrt import target as trt_target
from toolchain.targets.tensorrt.network import inspected
from toolchain.targets.tensorrt.options import (
    BuiltEngine,
    opened_runtime,
    refitted,
    require_options,
    set_options,
    timing_cache,
)
from toolchain.targets.tensorrt.target import TRT, TRT_RTX, TensorRT

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed: pip install 'slimvit[trt-rtx]'")
NO_GPU = gpu.no_gpu()
GPU = "NVIDIA L4"
EVERY = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""The compute capabilities that TensorRT for RTX 1.7 builds for."""


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """Two blocks of width 64, random; 8 linears in the blocks, 4 attention products and the head."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=2, num_classes=10, init_values=1.0
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.head.weight.mul_(50)
    path = tmp_path_factory.mktemp("onnx") / "tiny.fp32.onnx"
    export_onnx(model, path, input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
    return path


@pytest.fixture
def no_gpu(monkeypatch):
    for module in (trt_target, trt_options):
        monkeypatch.setattr(module, "no_gpu", lambda: "no NVIDIA driver or GPU")


@needs_rtx
@pytest.mark.parametrize("capabilities", [("8.9",), ("8.6", "12.0", "8.6"), EVERY[1:]])
def test_an_engine_is_built_ahead_of_time(capabilities, onnx_file, no_gpu, tmp_path):
    built = TRT_RTX.build(onnx_file, tmp_path, BuildOptions((1, 2, 8), capabilities))
    facts = built.facts
    distinct = list(dict.fromkeys(capabilities))
    assert built.path.name == f"tiny.fp32.{'-'.join('sm' + c.replace('.', '') for c in distinct)}.engine"
    assert list(tmp_path.iterdir()) == [built.path]
    engine = built.path.read_bytes()
    assert facts["size_bytes"] == len(engine)
    assert len(engine) > 200_000, "the weights alone are 400 kB"
    assert facts["engine_sha256"] == hashlib.sha256(engine).hexdigest()
    assert facts["onnx_sha256"] == hashlib.sha256(onnx_file.read_bytes()).hexdigest()
    assert facts["schema"] == "slimvit.engine/1"
    assert facts["compute_capabilities"] == distinct
    assert facts["profile"] == {"image": {"min": [1, 3, 32, 32], "opt": [2, 3, 32, 32], "max": [8, 3, 32, 32]}}
    assert (facts["loaded"], facts["inspector"]) == ("not_run", None)
    assert "driver" in facts["loaded_reason"]
    assert json.loads(json.dumps(facts)) == facts


@needs_rtx
def test_a_turing_gpu_gets_fp16_and_nothing_else(onnx_file, no_gpu, tmp_path):
    with pytest.raises(
        RecipeError, match=r"fp16 alone on compute capability 7\.5, and \S+\.onnx has products in FLOAT"
    ):
        TRT_RTX.build(onnx_file, tmp_path, BuildOptions(compute_capabilities=EVERY))
    with pytest.raises(
        RecipeError, match=r"fp16 alone on compute capability 7\.5, and engines in bf16, ours are asked for"
    ):
        TRT_RTX.require(BuildOptions(compute_capabilities=EVERY), {"fp16": "HALF", "bf16": "BF16", "ours": "INT8"})
    TRT_RTX.require(BuildOptions(compute_capabilities=EVERY), {"fp16": "HALF"})
    half = tmp_path / "tiny.fp16.onnx"
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32), dtype=np.float32)
    run_stage(Convert("fp16", half, images, images, real_images=False), OnnxFile(onnx_file))
    built = TRT_RTX.build(half, tmp_path, BuildOptions(compute_capabilities=EVERY))
    assert built.facts["compute_capabilities"] == list(EVERY)
    assert set(built.facts["matmul_dtypes"]) == {"HALF"}


@needs_rtx
def test_the_census_is_that_of_the_onnx_file(onnx_file, no_gpu, tmp_path):
    facts = TRT_RTX.build(onnx_file, tmp_path, BuildOptions(compute_capabilities=("8.9",))).facts
    nodes = [node.op_type for node in onnx.load(onnx_file).graph.node]
    assert facts["matmul_layers"] == sum(op in ("MatMul", "Gemm") for op in nodes) == 13
    assert facts["matmul_dtypes"] == {"FLOAT": 13}
    assert facts["layers"]["SOFTMAX"] == nodes.count("Softmax") == 2
    assert facts["layers"]["NORMALIZATION"] == nodes.count("LayerNormalization") == 5
    assert facts["strongly_typed"] is True
    assert "HALF" not in facts["tensor_dtypes"]
    assert facts["attention_layers"] == 2


@needs_rtx
def test_a_softmax_of_the_logits_is_no_attention(onnx_file, no_gpu, tmp_path):
    path = tmp_path / "softmax.onnx"
    onnx.save(with_probabilities(onnx.load(onnx_file)), path)
    facts = TRT_RTX.build(path, tmp_path, BuildOptions(compute_capabilities=("8.9",))).facts
    assert (facts["layers"]["SOFTMAX"], facts["attention_layers"]) == (3, 2)


@needs_rtx
def test_the_dtype_census_follows_the_graph_because_it_is_strongly_typed(no_gpu, tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((8, 8), np.float16), "w")
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["batch", 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "half", io[:1], io[1:], [weight])
    path = tmp_path / "half.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    facts = TRT_RTX.build(path, tmp_path, BuildOptions(compute_capabilities=("8.9",))).facts
    assert facts["matmul_dtypes"] == {"HALF": 1}
    assert "FLOAT" not in facts["tensor_dtypes"]


@needs_rtx
def test_a_broken_or_unknown_graph_is_refused_with_the_parsers_words(no_gpu, tmp_path):
    options = BuildOptions(compute_capabilities=("8.9",))
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match=r"cannot parse .*garbage\.onnx: .*Failed to parse"):
        TRT_RTX.build(garbage, tmp_path, options)
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in ("x", "y")]
    node = helper.make_node("Foo", ["x"], ["y"], domain="bar", name="foo_1")
    graph = helper.make_graph([node], "g", io[:1], io[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("bar", 1)]),
        tmp_path / "foo.onnx",
    )
    with pytest.raises(ArtifactError, match=r"Foo foo_1 .*Plugin not found"):
        TRT_RTX.build(tmp_path / "foo.onnx", tmp_path, options)
    with pytest.raises(StorageError, match=r"there is no .*none\.onnx"):
        TRT_RTX.build(tmp_path / "none.onnx", tmp_path, options)
    assert not list(tmp_path.glob("*.engine"))


@needs_rtx
@pytest.mark.parametrize(("asked", "said"), [(("9.9", "8.9"), "9.9"), ((), "none")])
def test_a_capability_that_cannot_be_built_names_those_that_can(asked, said, onnx_file, no_gpu, tmp_path):
    with pytest.raises(RecipeError, match=rf"{said}.*set engine.compute_capabilities to .*8\.9, 12\.0"):
        TRT_RTX.build(onnx_file, tmp_path, BuildOptions(compute_capabilities=asked))
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.parametrize(
    ("shape", "batch", "said"),
    [
        ((2, 3), (1, 1, 8), r"fixed batch of 2.* --batch 2 2 2 "),
        (("batch", "n"), (1, 1, 8), "only the batch may stay open.* --input-shape"),
    ],
)
def test_an_input_that_cannot_follow_the_profile_is_refused(shape, batch, said, no_gpu, tmp_path):
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", io[:1], io[1:])
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(RecipeError, match=said):
        TRT_RTX.build(path, tmp_path, BuildOptions(batch, ("8.9",)))


@needs_rtx
@pytest.mark.parametrize(
    ("sample", "said"), [((8, 8), ""), ((8, 9), "what is fixed stays"), ((8,), "what is fixed stays")]
)
def test_a_shape_that_the_file_leaves_open_is_asked_for(sample, said, no_gpu, tmp_path):
    """Kind: a file of open height and width. The engine is built for the size that is named, and for no other."""
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", "h", 8)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", io[:1], io[1:])
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    options = BuildOptions((1, 2, 4), ("8.9",), input_shape=sample)
    if said:
        with pytest.raises(RecipeError, match=said):
            TRT_RTX.build(path, tmp_path, options)
    else:
        profile = TRT_RTX.build(path, tmp_path, options).facts["profile"]["x"]
        assert profile == {"min": [1, 8, 8], "opt": [2, 8, 8], "max": [4, 8, 8]}


@needs_rtx
def test_a_fixed_batch_that_is_asked_for_needs_no_profile(no_gpu, tmp_path):
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2, 3)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", io[:1], io[1:])
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    assert TRT_RTX.build(path, tmp_path, BuildOptions((2, 2, 2), ("8.9",))).facts["profile"] == {}


@needs_rtx
def test_the_probe_tells_building_from_running(no_gpu):
    info = TRT_RTX.probe()
    assert (info.target, info.runtime, info.device) == ("trt-rtx", "tensorrt_rtx", "none")
    assert info.details["build"] == "yes (ahead of time)"
    assert info.details["run"].startswith("no: ")


@needs_rtx
def test_running_without_a_gpu_is_refused(no_gpu, tmp_path):
    with pytest.raises(TargetUnavailable, match=r"can be built but not run here \(no NVIDIA driver or GPU\)"):
        TRT_RTX.open(tmp_path / "x.engine", threads=1)
    same_module_bound_to_a_gpu = TensorRT("trt", "tensorrt_rtx", minimum=(1, 1), install="", ahead_of_time=False)
    with pytest.raises(TargetUnavailable, match="no NVIDIA driver"):
        same_module_bound_to_a_gpu.probe()


@needs_rtx
def test_a_gpu_without_kernels_builds_and_does_not_run(monkeypatch, tmp_path):
    """Such as an H100, of which TensorRT for RTX knows nothing."""
    found = {"no_gpu": None, "local_capability": "9.0"}
    places = [(module, name, answer) for module in (trt_target, gpu) for name, answer in found.items()]
    for place, name, answer in (*places, (gpu.torch.cuda, "get_device_name", "H100")):
        monkeypatch.setattr(place, name, lambda answer=answer: answer)
    info = TRT_RTX.probe()
    assert info.device == "H100 (compute capability 9.0)"
    assert info.details["build"].startswith("yes")
    assert info.details["run"].startswith("no: tensorrt_rtx")
    assert info.details["run"].endswith("no kernels for compute capability 9.0")
    with pytest.raises(TargetUnavailable, match=r"not run here \(.* no kernels for compute capability 9\.0\)"):
        TRT_RTX.open(tmp_path / "x.engine", threads=1)


@pytest.mark.parametrize("call", ["probe", "build", "open"])
def test_a_module_that_is_missing_says_how_to_get_it(call, tmp_path):
    absent = TensorRT(
        "trt", "tensorrt_that_is_not_there", minimum=(10, 12), install="pip install it", ahead_of_time=True
    )
    arguments = {"probe": (), "build": (tmp_path / "m.onnx", tmp_path, BuildOptions()), "open": (tmp_path / "e", 1)}
    with pytest.raises(TargetUnavailable) as caught:
        getattr(absent, call)(*arguments[call])
    assert caught.value.reason == "the Python module tensorrt_that_is_not_there is not installed"
    assert caught.value.install == "pip install it"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("__version__ = '10.3.0'", "10.3.0 is too old, 10.12 or newer"),
        ("raise OSError('libnvinfer.so')", "cannot be loaded"),
    ],
)
def test_a_module_that_is_old_or_broken_is_refused(source, said, tmp_path, monkeypatch):
    name = f"fake_trt_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetUnavailable, match=said):
        TensorRT("trt", name, minimum=(10, 12), install="", ahead_of_time=False).probe()


def test_the_two_targets_are_the_two_modules():
    assert [(t.name, t.module, t.ahead_of_time) for t in (TRT, TRT_RTX)] == [
        ("trt", "tensorrt", False),
        ("trt-rtx", "tensorrt_rtx", True),
    ]


OBJECTS = {  # variable in the source → class of the module
    "builder": "Builder",
    "parser": "OnnxParser",
    "e": "ParserError",
    "network": "INetworkDefinition",
    "layer": "ILayer",
    "tensor": "ITensor",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "loaded": "ICudaEngine",
    "cache": "ITimingCache",
    "refitter": "Refitter",
    "reader": "OnnxParserRefitter",
    "form": "ISerializationConfig",
    "flags": "BuilderFlag",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
}


def used_names():
    """(class, name) of everything that the files use of the TensorRT API."""
    found = set()
    for module in (trt_target, trt_network, trt_options, trt_runner):
        for node in ast.walk(ast.parse(Path(inspect.getsourcefile(module)).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
            if owner in ("trt", "_trt") and not node.attr.startswith("__"):
                found.add((node.attr, ""))
            elif owner in OBJECTS:
                found.add((OBJECTS[owner], node.attr))
            elif owner in API:
                found.add((owner, node.attr))
    return found


def test_the_list_of_api_names_is_complete():
    listed = {
        (owner, name) for table in (API, API_AHEAD_OF_TIME) for owner, names in table.items() for name in ("", *names)
    }
    torch_tensor = {("ITensor", name) for name in ("data_ptr", "to")}  # `tensor` is also a torch tensor in the runner
    missing = used_names() - listed - torch_tensor
    assert missing == set()
    assert ("IExecutionContext", "execute_async_v3") in used_names(), "the walk sees what it is for"


@pytest.mark.parametrize("major", ["10", "11"])
def test_every_api_name_exists_in_both_majors_of_tensorrt(major):
    """Against the names that the real bindings of the oldest and the newest TensorRT have; see tensorrt_names.py."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    (version,) = (each for each in recorded if each.startswith(f"{major}."))
    names = recorded[version]
    assert [f"{owner}.{name}" for owner in API for name in API[owner] if name not in names.get(owner, ())] == []
    assert set(trt_runner.TORCH_DTYPES) <= set(names["DataType"])
    assert ("FP16" in names["BuilderFlag"]) == (major == "10"), "the record tells the majors apart"
    assert tuple(map(int, version.split(".")[:2])) >= TRT.minimum


@needs_rtx
def test_every_api_name_exists_in_the_installed_module():
    module = importlib.import_module("tensorrt_rtx")
    for table in (API, API_AHEAD_OF_TIME):
        for owner, names in table.items():
            for name in names:
                assert hasattr(getattr(module, owner), name), f"{owner}.{name}"
    assert set(trt_runner.TORCH_DTYPES) <= set(module.DataType.__members__)


@needs_rtx
def test_an_onnx_file_is_built_once_for_a_batch_and_a_gpu(onnx_file, no_gpu, tmp_path, monkeypatch, watched):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    built = watched(TensorRT, "build")
    first = cached_engine(TRT_RTX, onnx_file, 2, "8.9", GPU)
    stamp = first.stat().st_mtime_ns
    assert [call.arguments[-1] for call in built] == [BuildOptions((2, 2, 2), ("8.9",))]
    assert cached_engine(TRT_RTX.in_mode(Mode(graph=True)), onnx_file, 2, "8.9", GPU) == first, (
        "a mode changes no engine"
    )
    assert (len(built), first.stat().st_mtime_ns) == (1, stamp)
    others = {cached_engine(TRT_RTX, onnx_file, 3, "8.9", GPU), cached_engine(TRT_RTX, onnx_file, 2, "8.6", GPU)}
    assert len({first, *others}) == len(built) == 3
    changed = tmp_path / "changed.onnx"
    model = onnx.load(onnx_file)
    model.metadata_props.add(key="k", value="v")
    onnx.save(model, changed)
    assert cached_engine(TRT_RTX, changed, 2, "8.9", GPU).parent != first.parent


def test_the_engine_of_an_open_file_is_for_the_shape_that_is_fed(tmp_path, monkeypatch):
    """Kind: an option that is given to a verb and asked for again below it. One engine each, kept apart in the cache."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    path, built = tmp_path / "m.onnx", []
    io = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", "h", 8)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", io[:1], io[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)

    class Stand:
        ahead_of_time, runtime = True, ("stand-in", "1")

        def build(self, onnx, folder, options):
            built.append(options)
            (folder / "a.engine").write_bytes(b"engine")
            return EngineBuild(folder / "a.engine", {})

    class Opened(contextlib.nullcontext):
        def __enter__(self):
            return self

        def infer(self, feeds):
            return {"from": self.enter_result}

    def engine_for(batch, sample, called=GPU):
        return cached_engine(Stand(), path, batch, "8.9", called, sample)

    with trt_runner.OnnxTrtRunner(engine_for, Opened) as runner:
        found = [
            runner.infer({"x": np.zeros(shape, np.float32)})["from"] for shape in ((2, 4, 8), (2, 6, 8), (2, 4, 8))
        ]
        assert [(each.batch, each.input_shape) for each in built] == [((2, 2, 2), (4, 8)), ((2, 2, 2), (6, 8))]
        assert found[0] == found[2] != found[1]
        runner.infer({"a": np.zeros((2, 4)), "b": np.zeros((2, 5))})
        assert built[-1].input_shape is None, "one shape cannot be that of several inputs"
    assert engine_for(2, (4, 8)) == found[0] != engine_for(2, (4, 8), "NVIDIA RTX 4090"), "which has other kernels"


def test_weights_beside_the_file_belong_to_the_key_of_an_engine(onnx_file, tmp_path):
    assert "onnx_data_sha256" not in source_digests(onnx_file)
    path = tmp_path / "m.onnx"
    onnx.save_model(onnx.load(onnx_file), path, save_as_external_data=True, location="m.weights", size_threshold=1024)
    assert list(source_digests(path)["onnx_data_sha256"]) == ["m.weights"]
    with pytest.raises(StorageError, match=r"none\.onnx"):
        source_digests(tmp_path / "none.onnx")


def test_an_onnx_file_gets_an_engine_for_each_batch_that_is_asked_for(tmp_path):
    class Opened:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            log.append(("open", self.path))
            return self

        def __exit__(self, *_):
            log.append(("close", self.path))

        def infer(self, feeds):
            return {"y": self.path}

        def time_ns(self, feeds, samples):
            return [1] * samples

    log = []
    with trt_runner.OnnxTrtRunner(lambda batch, _: tmp_path / str(batch), Opened) as runner:
        two, three = ({"x": np.zeros((batch, 4))} for batch in (2, 3))
        assert runner.infer(two) == {"y": tmp_path / "2"}
        assert runner.time_ns([two], 4) == [1] * 4
        assert runner.infer(three) == {"y": tmp_path / "3"}
    assert [(what, path.name) for what, path in log] == [("open", "2"), ("open", "3"), ("close", "3"), ("close", "2")]


ONE = ("8.9",)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (BuildOptions(compute_capabilities=("8.6", "8.9"), strip=True), RecipeError, "one compute capability, and 2"),
        (BuildOptions(compute_capabilities=ONE, strip=True), TargetUnavailable, "compiled by the driver"),
        (BuildOptions(compute_capabilities=ONE, hardware_compatible="ampere_plus"), RecipeError, "name their GPUs"),
        (BuildOptions(compute_capabilities=ONE, version_compatible=True), RecipeError, "the version that built them"),
    ],
)
def test_what_tensorrt_for_rtx_cannot_build_is_refused_before(no_gpu, options, error, words):
    with pytest.raises(error, match=words):
        require_options("trt-rtx", options)
    TRT.require(options, {"fp32": "FLOAT"})  # builds on the GPU that it is for, and has them all


@needs_rtx
def test_a_capability_that_is_named_twice_is_one(no_gpu):
    with pytest.raises(TargetUnavailable, match="compiled by the driver"):
        TRT_RTX.require(BuildOptions(compute_capabilities=("8.9", "8.9"), strip=True), {})


def test_only_an_engine_for_later_versions_may_bring_code():
    trt = SimpleNamespace(Runtime=lambda _: SimpleNamespace(engine_host_code_allowed=False))
    assert opened_runtime(trt, None, BuiltEngine().options).engine_host_code_allowed is False
    assert opened_runtime(trt, None, BuildOptions(version_compatible=True)).engine_host_code_allowed is True


@needs_rtx
def test_options_are_set_on_the_real_config():
    trt = importlib.import_module("tensorrt_rtx")
    flags = trt.BuilderFlag
    builder = trt.Builder(trt_runner.forwarding_logger("tensorrt_rtx"))
    for options, expected in (
        (BuildOptions(), set()),
        (BuildOptions(strip=True), {flags.STRIP_PLAN, flags.REFIT_IDENTICAL}),
        (BuildOptions(version_compatible=True), {flags.VERSION_COMPATIBLE}),
    ):
        config = builder.create_builder_config()
        set_options(trt, config, options)
        given = {flags.STRIP_PLAN, flags.REFIT_IDENTICAL, flags.VERSION_COMPATIBLE}
        assert {flag for flag in given if config.get_flag(flag)} == expected
    for name in ("ampere_plus", "same_compute_capability"):
        taken = SimpleNamespace()  # TensorRT for RTX takes the level and forgets it
        set_options(trt, taken, BuildOptions(hardware_compatible=name))
        assert taken.hardware_compatibility_level == getattr(trt.HardwareCompatibilityLevel, name.upper())


def test_timings_are_kept_from_one_build_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path))

    class Config:
        def __init__(self, accepts=True):
            self.accepts, self.cache = accepts, None

        def create_timing_cache(self, kept):
            return SimpleNamespace(kept=kept)

        def set_timing_cache(self, cache, ignore_mismatch):
            assert not ignore_mismatch
            self.cache = cache
            return self.accepts or not cache.kept

        def get_timing_cache(self):
            return SimpleNamespace(serialize=lambda: self.cache.kept + b"t")

    trt = SimpleNamespace(__name__="tensorrt", __version__="10.12.0")
    for config, expected in ((Config(), b""), (Config(), b"t"), (Config(accepts=False), b"")):
        with timing_cache(trt, config, "8.9"):
            assert config.cache.kept == expected
    with pytest.raises(RuntimeError), timing_cache(trt, Config(), "8.9"):
        raise RuntimeError("a build that fails leaves what was there")
    (kept,) = (tmp_path / "timing").glob("*.cache")
    assert (kept.name, kept.read_bytes()) == ("tensorrt-10.12.0-sm89.cache", b"t")
    with timing_cache(trt, None, None):
        pass


@needs_rtx
def test_weights_are_put_in_where_the_engine_runs(no_gpu, tmp_path):
    with pytest.raises(TargetUnavailable, match="not run here"):
        TRT_RTX.refit(tmp_path / "a.engine", tmp_path / "a.onnx", tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", '{"profile": {"image": {"min": []}}}', '{"options": 3}', '{"onnx_sha256": 1}']
)
def test_a_damaged_record_of_an_engine_is_told(content, tmp_path):
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"engine\.json is damaged: .*; build the engine again"):
        BuiltEngine.beside(tmp_path / "a.engine")


def test_what_another_engine_may_do_is_not_taken_for_this_ones(tmp_path):
    """Kind: a foreign engine in the folder of one of ours, which may bring code: so might this one have."""
    (tmp_path / "engine.json").write_text('{"engine": "ours.engine", "options": {"version_compatible": true}}')
    assert BuiltEngine.beside(tmp_path / "ours.engine").options.version_compatible
    assert BuiltEngine.beside(tmp_path / "foreign.engine") == BuiltEngine()


def test_weights_of_another_file_are_not_put_in(tmp_path):
    """They would be taken: names and shapes are the same after any other fine-tuning."""
    engine, onnx_ = tmp_path / "a.engine", tmp_path / "a.onnx"
    engine.write_bytes(b"engine")
    onnx_.write_bytes(b"weights")
    for built_from in (BuiltEngine(), BuiltEngine(onnx_sha256=hashlib.sha256(b"others").hexdigest())):
        with pytest.raises(ArtifactError, match="was not built from"):
            refitted(None, None, engine, onnx_, built_from)
    with pytest.raises(AttributeError, match="Runtime"):  # the digest is right, and the next step wants a TensorRT
        refitted(None, None, engine, onnx_, BuiltEngine(onnx_sha256=hashlib.sha256(b"weights").hexdigest()))


def test_the_inspector_is_read_by_layer():
    """Names as TensorRT's documentation shows them; none was seen on a GPU here."""

    def layer(name, *formats):
        return {"Name": name, "LayerType": "kgen", "Inputs": [{"Format/Datatype": each} for each in formats]}

    in_11 = {"Name": "_gemm_7", "Inputs": [{"Format": "Row major linear (kLINEAR)", "DataType": "Half"}]}
    assert inspected({"Layers": [in_11]})["inspected_products"] == {"HALF": 1}
    found = inspected(
        {
            "Layers": [
                layer("__myl_Fc_gemm_0", "Half", "Half"),
                layer("__myl_MatMul_1", "Row major linear FP32", "Float"),
                layer("_gemm_mha_v2_2", "Half"),
                layer("__myl_Cast_3", "Float"),
                layer("sm80_xmma_gemm_i8_4", "Int8", "Int8"),
                layer("gemm_bf_5", "BFloat16"),
                "a name alone",
            ]
        }
    )
    assert found == {"inspected_products": {"BF16": 1, "FLOAT": 1, "HALF": 2, "INT8": 1}, "fused_attention": 1}
    assert inspected({}) == {"inspected_products": {}, "fused_attention": 0}


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("target", [TRT, TRT_RTX], ids=lambda t: t.name)
def test_a_stripped_engine_gets_its_weights_back(target, onnx_file, tmp_path):
    import onnxruntime as ort

    options = BuildOptions((1, 1, 8), (gpu.local_capability(),), strip=True)
    try:
        built = target.build(onnx_file, tmp_path, options)
    except (TargetUnavailable, RecipeError) as error:
        pytest.skip(str(error))
    assert built.facts["loaded"] == "not_run"
    assert "slimvit refit" in built.facts["loaded_reason"]
    (tmp_path / "engine.json").write_text(json.dumps(built.facts))  # as BuildEngine does
    (tmp_path / "whole").mkdir()
    found = target.refit(built.path, onnx_file, tmp_path / "whole")
    whole = found.path
    assert (found.facts["loaded"], found.facts["options"]["strip"]) == ("pass", False)
    assert whole.stat().st_size == found.facts["size_bytes"] > built.path.stat().st_size
    image = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = ort.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]
    with target.open(whole, threads=1) as runner:
        assert np.abs(runner.infer({"image": image})["logits"] - expected).max() <= 2e-2 * np.abs(expected).max()


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize("mode", EVERY_MODE, ids=lambda mode: mode.suffix or "plain")
@pytest.mark.parametrize("target", [TRT, TRT_RTX], ids=lambda t: t.name)
def test_an_onnx_file_is_timed_in_every_mode(target, mode, onnx_file, tmp_path, monkeypatch):
    import onnxruntime as ort

    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path))
    reference = ort.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = [{"image": rng.standard_normal((2, 3, 32, 32)).astype(np.float32)} for _ in range(3)]
    try:
        target.probe()
        with target.in_mode(mode).open(onnx_file, threads=1) as runner:
            for feed in feeds:
                expected = reference.run(None, feed)[0]
                got = runner.infer(feed)["logits"]
                assert np.abs(got - expected).max() <= 2e-2 * max(1.0, np.abs(expected).max())
            times = runner.time_ns(feeds, 20)
            (engine,) = runner._runners.values()
            for feed, call in engine._calls.values():
                got = call.launched.outputs["logits"].cpu().numpy()
                assert np.abs(got - reference.run(None, feed)[0]).max() <= 2e-2 * max(1.0, np.abs(got).max())
    except (TargetUnavailable, RecipeError) as error:
        pytest.skip(str(error))
    assert (len(times), min(times) > 0) == (20, True)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))
@pytest.mark.parametrize(
    "options",
    [{}, {"version_compatible": True}, {"hardware_compatible": "ampere_plus"}],
    ids="".join,
)
@pytest.mark.parametrize("target", [TRT, TRT_RTX], ids=lambda t: t.name)
def test_an_engine_runs_and_agrees_with_onnx_runtime(target, options, onnx_file, tmp_path):
    import onnxruntime as ort

    capability = gpu.local_capability()
    try:
        built = target.build(onnx_file, tmp_path, BuildOptions((1, 1, 8), (capability,), **options))
    except (TargetUnavailable, RecipeError) as error:
        pytest.skip(str(error))
    (tmp_path / "engine.json").write_text(json.dumps(built.facts))
    assert built.facts["loaded"] == "pass"
    assert built.facts["inspector"]["Layers"]
    assert built.facts["inspected_products"], "the inspector's names are those that slimvit knows"
    reference = ort.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    with target.open(built.path, threads=1) as runner:
        for batch in (1, 3):
            image = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32)).astype(np.float32)
            expected = reference.run(None, {"image": image})[0]
            got = runner.infer({"image": image})["logits"]
            assert np.abs(got - expected).max() <= 2e-2 * max(1.0, np.abs(expected).max())  # TF32 products
        times = runner.time_ns([{"image": image}], samples=20)
        with pytest.raises(ArtifactError, match="outside the optimization profile"):
            runner.infer({"image": np.zeros((9, 3, 32, 32), np.float32)})
    assert len(times) == 20
    assert min(times) > 0
