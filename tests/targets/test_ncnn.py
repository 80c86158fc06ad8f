"""ncnn: what pnnx leaves out is an error, a wrong file fails its rung, and a crash of ncnn is not the session's."""

import os
import signal
import sys
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import STRUCTURES, dense_model, shallow
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from sweeps import swept

from toolchain.artifacts import open_artifact
from toolchain.artifacts.ncnn_format import read_layers, read_numbers
from toolchain.artifacts.onnx_file import PRECISION, PREPROCESS, OnnxFile
from toolchain.errors import ArtifactError, ParityError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.engine import BuildEngine
from toolchain.export.engine_parity import engine_rung
from toolchain.export.half import fp16
from toolchain.export.onnx_graph import export_onnx
from toolchain.model import run_stage
from toolchain.on_device.runner import time_calls_ns
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions, EngineBuild
from toolchain.targets.ncnn import convert, target
from toolchain.targets.ncnn.convert import converter, require_whole
from toolchain.targets.ncnn.runner import NcnnRunner
from toolchain.targets.ncnn.target import NCNN

INSTALL = "pip install 'slimvit[ncnn]'"
pytestmark = pytest.mark.skipif(
    find_spec("ncnn") is None or converter() is None, reason=f"ncnn or pnnx is not installed: {INSTALL}"
)
ONE = (1, 1, 1)
SECTION = EngineSection(targets=("ncnn",), batch=ONE)


def noise(count, size=(3, 32, 32)):
    return np.random.default_rng(0).standard_normal((count, *size)).astype(np.float32)


def rung(source, built):
    size = tuple(source.image.sample)
    return engine_rung(source, built, ONE, partial(noise, size=size), None)


def built_of(source, folder):
    """What `slimvit engine` does: build, compare, record."""
    stage = BuildEngine(SECTION, "ncnn", folder, lambda built: rung(source, built))
    return run_stage(stage, source)


def exported(model, path):
    metadata = {PREPROCESS: '{"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}'}
    size = model.preprocess.input_size
    metadata = metadata if size == (3, 32, 32) else {}
    names = model.output_names
    export_onnx(model.module, path, input_size=size, opset=20, metadata=metadata, simplify=True, outputs=names)
    return OnnxFile(path)


@cache
def classic():
    return dense_model()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return exported(classic(), tmp_path_factory.mktemp("ncnn") / "tiny.onnx")


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    return built_of(source, tmp_path_factory.mktemp("ncnn") / "engine")


@pytest.fixture
def altered(built, tmp_path):
    """A copy of the built model, and what an alteration of its parts makes of its rung."""
    path = tmp_path / built.artifact.path.name
    for suffix in (".param", ".bin"):
        path.with_suffix(suffix).write_bytes(built.artifact.path.with_suffix(suffix).read_bytes())
    return path


def verdict(path, built, source):
    return rung(source, EngineBuild(path, built.artifact.facts)).verdict


def last_of(path, kind):
    """The name of the last layer of a kind."""
    return [layer.name for layer in read_layers(path) if layer.kind == kind][-1]


def changed_numbers(path, layer, part, change):
    """Rewrites what a layer holds."""
    numbers, rest = read_numbers(read_layers(path), path.with_suffix(".bin"))
    assert rest == 0
    content, offset = bytearray(path.with_suffix(".bin").read_bytes()), 0
    for each in numbers:
        end = offset + each.size_bytes
        if (each.layer, each.part) == (layer, part):
            begin = end - 4 * each.count
            values = np.frombuffer(bytes(content[begin:end]), np.float32)
            content[begin:end] = change(values.copy()).astype(np.float32).tobytes()
        offset = end
    path.with_suffix(".bin").write_bytes(bytes(content))


def test_an_engine_is_the_file_to_the_last_digits_and_says_what_it_is(built, source):
    (found,) = built.rungs
    assert (found.verdict, found.tolerance.max_abs) == ("pass", 1e-5)
    assert found.max_abs < 1e-6
    engine = open_artifact(built.artifact.path)
    assert (engine.name, engine.precision.name) == ("ncnn", "fp32")
    assert [port.name for port in engine.inputs] == ["image"]
    assert [(port.name, port.shape) for port in engine.outputs] == [("logits", (1, 7))]
    assert engine.record["renamed"] == {"in0": "image", "out0": "logits"}
    assert engine.record["matmul_dtypes"] == {"FLOAT": 9}
    assert set(engine.record["weights"]) == {"f32"}
    assert engine.record["options"]["use_fp16_arithmetic"] is False
    assert engine.preprocess == source.preprocess is not None
    assert sum(engine.parts.values()) == engine.size_bytes


def test_fp16_is_how_weights_are_stored(source, built, tmp_path):
    converted = fp16(onnx.load(source.path), noise(4)).model
    converted.metadata_props.add(key=PRECISION, value="fp16")
    onnx.save(converted, tmp_path / "tiny.fp16.onnx")
    made = built_of(OnnxFile(tmp_path / "tiny.fp16.onnx"), tmp_path / "engine")
    (found,) = made.rungs
    assert found.verdict == "pass"
    assert 0 < found.max_abs < 5e-3
    engine = open_artifact(made.artifact.path)
    assert engine.record["matmul_dtypes"] == {"HALF": 9}
    assert engine.precision.name == "fp16"
    assert engine.size_bytes < 0.55 * open_artifact(built.artifact.path).size_bytes


def test_inputs_and_outputs_of_fp16_are_fp32_in_ncnn(source, tmp_path):
    halved = convert_float_to_float16(onnx.load(source.path), keep_io_types=False)
    assert {port.type.tensor_type.elem_type for port in (*halved.graph.input, *halved.graph.output)} == {
        TensorProto.FLOAT16
    }
    halved.metadata_props.add(key=PRECISION, value="fp16")
    onnx.save(halved, tmp_path / "halved.onnx")
    made = built_of(OnnxFile(tmp_path / "halved.onnx"), tmp_path / "engine")
    assert [each.verdict for each in made.rungs] == ["pass"]
    assert made.artifact.record.weights.keys() == {"f16", "f32"}
    assert [port.type for port in open_artifact(made.artifact.path).inputs] == ["float32"]


REWRITTEN = (
    *("average pooling", "BEiT", "RoPE-ViT", "parallel", "grouped queries"),
    *("Swin V2, padded windows", "differential", "differential, parallel", "NaFlex", "hybrid"),
)


USUAL = ("average pooling", "NaFlex")
"""They are rewritten otherwise, as RoPE-ViT, the parallel kinds and hybrids are each in a way of their own."""


@pytest.mark.slow
@pytest.mark.parametrize("case", swept(REWRITTEN, USUAL))
def test_what_pnnx_would_misread_is_rewritten(case, tmp_path):
    """Means without their axis, sizes too many, every second number, stacks, lengths, norms of one size or in parts."""
    made = built_of(exported(shallow(case), tmp_path / "m.onnx"), tmp_path / "engine")
    assert [each.verdict for each in made.rungs] == ["pass"]


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in STRUCTURES if case not in REWRITTEN])
def test_every_structure_agrees(case, tmp_path):
    made = built_of(exported(shallow(case), tmp_path / "m.onnx"), tmp_path / "engine")
    assert [each.verdict for each in made.rungs] == ["pass"]


def graph(path, nodes, weights, shape=("batch", 3, 32), names=("image", "logits"), out=None):
    io = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, s)
        for name, s in zip(names, (shape, out or shape), strict=True)
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "g", io[:1], io[1:], tensors)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_dropped_operator_is_named_and_nothing_is_written(tmp_path):
    shapes = {"six": np.array([1, 3, 2, 2, 2, 4]), "three": np.array([1, 3, 32])}
    nodes = [
        helper.make_node("Reshape", ["image", "six"], ["apart"]),
        helper.make_node("Transpose", ["apart"], ["turned"], perm=[5, 4, 3, 2, 1, 0]),
        helper.make_node("Softmax", ["turned"], ["shares"], axis=1),
        helper.make_node("Reshape", ["shares", "three"], ["logits"]),
    ]
    path = graph(tmp_path / "m.onnx", nodes, shapes)
    (folder := tmp_path / "built").mkdir()
    with pytest.raises(ArtifactError, match=r"m\.onnx: pnnx left out Tensor\.reshape"):
        NCNN.build(path, folder, BuildOptions(ONE))
    assert list(folder.iterdir()) == []


def test_a_pnnx_that_cannot_be_started_is_told_with_what_to_do(tmp_path):
    program = tmp_path / "pnnx"
    program.write_text("of another processor\n")
    program.chmod(0o755)
    with pytest.raises(
        StorageError, match=r"cannot start .*pnnx: Exec format error; install the one for this processor"
    ):
        convert._run(program, tmp_path / "model.onnx", tmp_path / "m.onnx", convert.Names({}, ()), fp16=False)


def test_what_pnnx_says_in_its_log_is_read():
    require_whole("FLOPS = 894.613K\nmodel inputshape = [1,3,32,32]f32\n", Path("m.onnx"))
    lines = ("Tensor.to Tensor.to_7 param copy=False", "Tensor.to Tensor.to_7 param dtype=torch.half")
    lines = (*lines, "Tensor.to Tensor.to_8 param copy=False", "aten::sign s param x=1")
    with pytest.raises(ArtifactError, match=r"left out Tensor\.to ×2, aten::sign"):
        require_whole("\n".join(f"ignore {line}" for line in lines), Path("m.onnx"))
    with pytest.raises(ArtifactError, match="slice with step 2 is not supported"):
        require_whole("slice with step 2 is not supported\n", Path("m.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "part", "change"),
    [
        ("InnerProduct", "bias", np.zeros_like),
        ("Gemm", "bias", np.zeros_like),
        ("InnerProduct", "weight", lambda values: values * 1.01),
        ("LayerNorm", "weight", lambda values: values * 1.001),
    ],
    ids=["dropped bias of the classifier", "dropped bias", "wrong scale", "slightly wrong scale"],
)
def test_wrong_numbers_fail_the_rung(kind, part, change, altered, built, source):
    assert verdict(altered, built, source) == "pass"
    changed_numbers(altered, last_of(altered, kind), part, change)
    assert verdict(altered, built, source) == "fail"


def operator_ignored(path):
    assert "GELU" in path.read_text()
    path.write_text(path.read_text().replace("GELU", "Noop", 1))


def heads_swapped(path):
    """The keys of two heads change places in one attention: 3 heads of 16 in queries, keys and values, each of 48."""

    def swapped(values):
        rows = values.reshape(144, -1)
        rows[[*range(48, 64), *range(64, 80)]] = rows[[*range(64, 80), *range(48, 64)]]
        return rows.ravel()

    layer = next(layer.name for layer in read_layers(path) if layer.kind == "Gemm" and layer.number(8) == 144)
    for part in ("weight", "bias"):
        changed_numbers(path, layer, part, swapped)


@pytest.mark.parametrize("fault", [operator_ignored, heads_swapped])
def test_a_wrong_graph_fails_the_rung(fault, altered, built, source):
    fault(altered)
    assert verdict(altered, built, source) == "fail"


def test_swapped_heads_are_known_by_the_outputs_alone(altered, built):
    """All that is asked of an engine but its rung: graph, sizes, types, the numbers themselves, the shapes that it gives."""
    honest = open_artifact(built.artifact.path)
    heads_swapped(altered)
    swapped = open_artifact(altered)
    assert (swapped.graph, swapped.weights, swapped.parts) == (honest.graph, honest.weights, honest.parts)
    numbers = [np.sort(np.fromfile(each.with_suffix(".bin"), np.uint32)) for each in (altered, built.artifact.path)]
    np.testing.assert_array_equal(*numbers)
    assert target._proof(altered, {"image": (3, 32, 32)}) == built.artifact.facts["outputs"]
    assert swapped.sha256 != honest.sha256


@pytest.mark.slow
@pytest.mark.parametrize("fault", [operator_ignored, heads_swapped])
def test_a_wrong_engine_replaces_nothing(fault, source, tmp_path, monkeypatch):
    def faulty(*arguments, **options):
        renamed = convert.convert(*arguments, **options)
        fault(arguments[2])
        return renamed

    monkeypatch.setattr(target, "convert", faulty)
    with pytest.raises(ParityError, match="max"):
        built_of(source, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("fault", [signal.SIGSEGV, signal.SIGSTOP])
def test_a_crash_or_a_hang_ends_the_process_of_ncnn_alone(fault, built):
    path = built.artifact.path
    with NcnnRunner(path, 1) as runner:
        runner.infer({"image": noise(1)})
        runner._answer_s = 1.0
        os.kill(runner.pid, fault)
        expected = "ended with SIGSEGV" if fault == signal.SIGSEGV else "gave no answer within 1 s"
        with pytest.raises(ArtifactError, match=rf"ncnn {expected} while running .*tiny\.param"):
            runner.infer({"image": noise(1)})


def test_what_is_damaged_is_named(altered):
    weights = altered.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-3000])
    with pytest.raises(ArtifactError, match=r"tiny\.(param|bin)"), NCNN.open(altered, 1) as runner:
        runner.infer({"image": noise(1)})


def test_names_are_the_models_own_even_where_they_are_numbers(tmp_path):
    """Kind: what torch calls the values of a graph is what pnnx calls others."""
    weight = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["2", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["1"]),
    ]
    path = graph(tmp_path / "m.onnx", nodes, {"a": weight[0], "b": weight[1]}, ("batch", 8), ("2", "1"))
    x = noise(1, (8,))
    with NCNN.open(NCNN.build(path, tmp_path, BuildOptions(ONE)).path, 1) as runner:
        outputs = runner.infer({"2": x})
        with pytest.raises(RecipeError, match="'2' got nothing"):
            runner.infer({"1": x})
    assert list(outputs) == ["1"]
    np.testing.assert_allclose(outputs["1"], np.maximum(x @ weight[0], 0) @ weight[1], rtol=1e-5, atol=1e-5)


def test_a_batch_is_refused_before_any_work(built, tmp_path):
    assert NCNN.batches(BuildOptions((1, 1, 8))) == (1,)
    with pytest.raises(RecipeError, match=r"let engine\.batch begin with 1"):
        NCNN.build(tmp_path / "absent.onnx", tmp_path, BuildOptions((2, 2, 2)))
    with NCNN.open(built.artifact.path, 1) as runner, pytest.raises(RecipeError, match="one sample a call"):
        runner.infer({"image": noise(2)})
    with pytest.raises(RecipeError, match="fixed batch of 1, asked for 2"):
        open_artifact(built.artifact.path).signature(2)


def test_pixels_are_refused(tmp_path):
    io = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 8, 8, 3])]
    out = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 8, 8, 3])]
    made = helper.make_graph([helper.make_node("Cast", ["image"], ["logits"], to=TensorProto.FLOAT)], "g", io, out)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match=r"uint8, and ncnn takes float32 alone; export it without export\.preprocess"):
        NCNN.build(tmp_path / "m.onnx", tmp_path, BuildOptions(ONE))


def test_threads_are_counted(built, monkeypatch):
    path, feeds = built.artifact.path, {"image": noise(1)}
    with NCNN.open(path, 2) as runner:
        assert runner.infer(feeds)["logits"].shape == (1, 7)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    with NCNN.open(path, 2) as runner, pytest.raises(TargetUnavailable, match="asked for 2 threads and 1 work"):
        runner.infer(feeds)


def test_options_that_read_back_as_others_are_refused(built):
    with (
        NcnnRunner(built.artifact.path, 1) as runner,
        pytest.raises(TargetUnavailable, match="use_fp16_packed = False"),
    ):
        runner._require({"use_fp16_packed": True, "num_threads": 1})


def test_time_is_taken_inside_the_process(built):
    """The way to the process and back is no part of it."""
    feeds = [{"image": image[None]} for image in noise(3)]
    with NCNN.open(built.artifact.path, 1) as runner:
        runner.time_ns(feeds, 20)
        inside = sorted(runner.time_ns(feeds, 50))[25]
        outside = sorted(time_calls_ns(runner.infer, feeds, 50))[25]
    assert 0 < inside < outside


def test_outside_its_block_a_runner_does_nothing(built):
    with pytest.raises(RuntimeError, match="with"):
        NCNN.open(built.artifact.path, 1).infer({"image": noise(1)})


def test_without_its_packages_it_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ncnn", None)
    for call in (NCNN.probe, lambda: NCNN.open(tmp_path / "m.param", 1)):
        with pytest.raises(TargetUnavailable) as caught:
            call()
        assert (caught.value.reason, caught.value.install) == ("the Python module ncnn is not installed", INSTALL)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pnnx", None)
    with pytest.raises(TargetUnavailable, match=r"pnnx.*not installed.*slimvit\[ncnn\]"):
        NCNN.require(BuildOptions(ONE), {})
