"""Files that litert-torch made run right, are held weight by weight, and are refused where they could lie.

What converts needs another interpreter, and is skipped where none is named; all else needs ai-edge-litert alone.
"""

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from builders import TINY, dense_model, variant

from toolchain.artifacts import Reading, open_artifact
from toolchain.artifacts.onnx_file import PRECISION, PREPROCESS, OnnxFile
from toolchain.artifacts.onnx_folded import folded
from toolchain.cli.stages import _engine_rung
from toolchain.errors import ArtifactError, ParityError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.engine import BuildEngine
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.precision import PRECISIONS, reference_target
from toolchain.on_device import runner as device_runner
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions, EngineBuild, get_target
from toolchain.targets.litert import converter, program
from toolchain.targets.litert.program import Source
from toolchain.targets.litert.target import LITERT_CPU, fully_delegated
from toolchain.targets.litert.weights import require_weights, rounded

DATA = Path(__file__).with_name("litert")
FP32, INT8 = DATA / "tiny.fp32.tflite", DATA / "tiny.int8-dynamic.tflite"

needs_runtime = pytest.importorskip("ai_edge_litert.interpreter", reason="pip install 'slimvit[litert]'")


@pytest.fixture(scope="module")
def convertible():
    """Skips where there is nothing to convert with, with the target's own reason."""
    try:
        return converter.Converter.found("litert-cpu")
    except TargetUnavailable as error:
        pytest.skip(str(error))


def images(batch, size=16):
    return np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)


def outputs(path, batch=3, size=16):
    name = "litert-cpu" if path.suffix == ".tflite" else "ort-cpu"
    with get_target(name).open(path, 1) as runner:
        return runner.infer({"image": images(batch, size)})["logits"]


def planted(path, folder, change):
    """A copy of a .tflite file that was changed as an object of its schema."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_with_mutable_tensors(path)
    change(model)
    flatbuffer_utils.write_model(model, folder / path.name)
    return folder / path.name


def named(model, name):
    """The tensor of a name in each graph, and its buffer."""
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.name == name.encode():
                yield tensor, model.buffers[tensor.buffer]


def rung(path, source):
    facts = {"target": "litert-cpu", "batches": [1, 3], "engine": path.name}
    return _engine_rung(OnnxFile(source), EngineBuild(path, facts), (1, 1, 3), None)


@pytest.mark.parametrize(("path", "bound"), [(FP32, 1e-6), (INT8, 1e-3)])
def test_a_file_computes_what_its_onnx_file_does(path, bound):
    expected, got = outputs(path.with_suffix(".onnx"), 5), outputs(path, 5)
    assert got.shape == (5, 5)
    assert np.abs(got - expected).max() <= bound
    verdict = rung(path, path.with_suffix(".onnx"))
    assert verdict.verdict == "pass", verdict.reason


def test_names_and_preprocessing_travel_in_the_file():
    with LITERT_CPU.open(FP32, 1) as runner:
        assert list(runner.infer({"image": images(1)})) == ["logits"]
    ours, source = open_artifact(FP32), open_artifact(FP32.with_suffix(".onnx"))
    assert ours.preprocess == source.preprocess is not None


def drop_bias(model):
    for tensor, buffer in named(model, "head.bias"):
        buffer.data = np.zeros(tensor.shape, np.float32).view(np.uint8)


def swap_heads(model):
    """The two heads' values change places before the projection."""
    for tensor, buffer in named(model, "blocks.0.attn.proj.weight"):
        weight = np.asarray(buffer.data, np.uint8).view(np.float32).reshape(tensor.shape)
        buffer.data = np.ascontiguousarray(np.roll(weight, 8, axis=1)).reshape(-1).view(np.uint8)
        return


def ignore_gelu(model):
    """What reads the GELU's output reads its input instead, as where a converter drops an operator that it does not know."""
    from ai_edge_litert import schema_py_generated as schema

    for graph in model.subgraphs:
        (gelu,) = (
            op
            for op in graph.operators
            if model.operatorCodes[op.opcodeIndex].builtinCode == schema.BuiltinOperator.GELU
        )
        graph.operators.remove(gelu)
        for op in graph.operators:
            op.inputs = [gelu.inputs[0] if each == gelu.outputs[0] else each for each in op.inputs]


@pytest.mark.parametrize("fault", [drop_bias, swap_heads, ignore_gelu])
def test_a_fault_of_the_converter_fails_the_rung(fault, tmp_path):
    path = planted(FP32, tmp_path, fault)
    verdict = rung(path, FP32.with_suffix(".onnx"))
    assert verdict.verdict == "fail"
    assert "max |Δ|" in verdict.reason


def wrong_scale(model):
    for tensor, _ in named(model, "blocks.0.mlp.fc1.weight"):
        tensor.quantization.scale = np.asarray(tensor.quantization.scale) * np.float32(1 + 1e-6)


def wrong_code(model):
    for _, buffer in named(model, "blocks.0.mlp.fc1.weight"):
        data = np.array(buffer.data, np.uint8)
        data[7] ^= 1
        buffer.data = data
        return


def lost_weight(model, name="blocks.0.mlp.fc1.weight"):
    for tensor, _ in named(model, name):
        tensor.name = b"other"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (wrong_scale, "the scales of blocks.0.mlp.fc1.weight are not those"),
        (wrong_code, "the int8 numbers of blocks.0.mlp.fc1.weight are not those"),
        (lost_weight, "the weight of blocks.0.mlp.fc1.weight is missing"),
    ],
)
def test_int8_weights_are_held_integer_for_integer(fault, words, tmp_path):
    source = Source.of(INT8.with_suffix(".onnx"))
    assert require_weights(source, INT8) == {"FLOAT": 2, "INT8-DYNAMIC": 4}
    with pytest.raises(ArtifactError, match=words):
        require_weights(source, planted(INT8, tmp_path, fault))


def test_a_weight_of_fp16_that_is_missing_is_found(tmp_path):
    """Kind: a converter that leaves a linear in fp32, under a name of its own."""
    source = Source.of(FP32.with_suffix(".onnx"))
    assert require_weights(source, FP32) == {"FLOAT": 6}
    for name in ("blocks.0.attn.proj.weight", "patch_embed.proj.weight"):
        asked = replace(source, halves=frozenset({name}))
        with pytest.raises(ArtifactError, match=f"the weight of {name} is float32; the ONNX file has it in float16"):
            require_weights(asked, FP32)
        other = planted(FP32, tmp_path, lambda model, name=name: lost_weight(model, name))
        with pytest.raises(ArtifactError, match=f"the weight of {name} is missing; the ONNX file has it in float16"):
            require_weights(asked, other)


def test_every_int8_code_is_that_of_the_onnx_file():
    """Read here by another way than the check does: the .tflite file by name, the ONNX file by its initializers."""
    stored = {
        each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(INT8.with_suffix(".onnx")).graph.initializer
    }
    codes = sorted(array.T.tobytes() for name, array in stored.items() if name.endswith("_quantized"))
    graph = open_artifact(INT8).content.graphs[0]
    assert (
        sorted(each.values.tobytes() for each in graph.tensors if each.type == "int8" and each.data is not None)
        == codes
    )
    assert len(codes) == 4


@pytest.mark.parametrize(("scale", "kept"), [(1e-2, True), (1e-6, False), (1e-9, False), (1e6, False), (0.0, True)])
def test_a_weight_of_fp16_has_its_digits_or_is_refused(scale, kept):
    weight = np.random.default_rng(0).standard_normal((48, 48)).astype(np.float32)
    weight[:3] *= np.float32(1e-7)
    weight *= np.float32(scale)
    if not kept:
        with pytest.raises(ArtifactError, match="fp16 has its digits from 6e-05 to 65504; build from the fp32"):
            rounded(FP32, "fc.weight", weight)
        return
    np.testing.assert_array_equal(rounded(FP32, "fc.weight", weight), weight.astype(np.float16))


def test_a_fold_that_changes_what_is_computed_is_found(monkeypatch, tmp_path):
    def spoilt(content):
        model = folded(content).model
        bias = next(each for each in model.graph.initializer if each.name == "blocks.0.attn.proj.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) * np.float32(1.01), bias.name))
        return replace(content, model=model)

    monkeypatch.setattr(program, "folded", spoilt)
    with pytest.raises(ArtifactError, match=r"with what is constant taken into its linears, logits is \S+ off"):
        Source.of(FP32.with_suffix(".onnx")).save(tmp_path, [1], None)


def test_everything_is_delegated_and_the_runtime_says_nothing(capfd):
    assert fully_delegated(FP32)
    assert fully_delegated(INT8)
    assert capfd.readouterr() == ("", "")


def test_what_is_not_delegated_is_seen(tmp_path):
    """Kind: an operator that XNNPACK does not take in fp32, here SIGN in place of the GELU."""
    from ai_edge_litert import schema_py_generated as schema

    def foreign(model):
        (code,) = (each for each in model.operatorCodes if each.builtinCode == schema.BuiltinOperator.GELU)
        code.builtinCode, code.deprecatedBuiltinCode = schema.BuiltinOperator.SIGN, 127

    assert not fully_delegated(planted(FP32, tmp_path, foreign))


def test_a_batch_without_a_signature_is_split_and_never_timed():
    with LITERT_CPU.open(FP32, 1) as runner:
        whole = runner.infer({"image": images(7)})["logits"]
        singly = np.concatenate([runner.infer({"image": images(7)[i : i + 1]})["logits"] for i in range(7)])
        np.testing.assert_allclose(whole, singly, atol=1e-6)
        assert len(runner.time_ns([{"image": images(3)}], 4)) == 4
        with pytest.raises(RecipeError, match=r"it takes .*\[1, 3, 16, 16\].* got .*\[2, 3, 16, 16\]"):
            runner.time_ns([{"image": images(2)}], 4)
        with pytest.raises(RecipeError, match="got"):
            runner.infer({"image": images(1, size=8)})
        with pytest.raises(RecipeError, match="got"):
            runner.infer({"picture": images(1)})
    with pytest.raises(RecipeError, match=r"batches of 1, 3, asked for 2; name it in engine\.batch"):
        open_artifact(FP32).signature(2)


def test_of_several_signatures_of_one_batch_the_first_is_run(tmp_path):
    """Kind: a file that classifies and embeds, of which the last was run under the names of the first."""

    def embeds(model):
        other = copy.deepcopy(model.signatureDefs[0])
        other.signatureKey, other.outputs[0].name = b"embed", b"embedding"
        model.signatureDefs.append(other)

    path = planted(FP32, tmp_path, embeds)
    with LITERT_CPU.open(path, 1) as runner:
        assert (
            [*runner.infer({"image": images(1)})] == [each.name for each in open_artifact(path).outputs] == ["logits"]
        )


def test_an_open_batch_is_one_image_a_call(tmp_path):
    """Kind: Keras models as TensorFlow converts them, of which slimvit said that they take batches of none."""

    def opened(model):
        model.signatureDefs = model.signatureDefs[:1]
        model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]].shapeSignature = np.array([-1, 3, 16, 16], np.int32)

    artifact = open_artifact(planted(FP32, tmp_path, opened))
    assert (artifact.batches, artifact.image.batch) == ((1,), None)
    assert artifact.signature(1) == open_artifact(FP32).signature(1)
    with pytest.raises(RecipeError, match="was built for batches of 1, asked for 2"):
        artifact.signature(2)
    np.testing.assert_allclose(outputs(artifact.path), outputs(FP32), atol=1e-6)


def test_a_file_that_takes_fp16_is_held_against_one_that_takes_fp32(tmp_path):
    """Kind: fp16 files of other tools, which take fp16 as well; LiteRT's take fp32, and were not judged but refused."""
    path = tmp_path / "half.onnx"
    model = onnx.load(FP32.with_suffix(".onnx"))
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for node in model.graph.node:
        node.input[:] = ["image.fp32" if name == "image" else name for name in node.input]
    steps = [("image", "image.fp16", "FLOAT16"), ("image.fp16", "image.fp32", "FLOAT")]
    casts = [
        onnx.helper.make_node("Cast", [before], [after], to=onnx.TensorProto.DataType.Value(kind))
        for before, after, kind in steps
    ]
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    assert OnnxFile(path).image.type == "float16"
    verdict = rung(FP32, path)
    assert verdict.verdict == "pass", verdict.reason


def test_a_file_in_a_precision_that_no_onnx_file_has_here_is_run_by_its_runtime():
    """Kind: weights in int4 by another tool, refused with a line about ONNX Runtime."""
    found = SimpleNamespace(name="tflite", word=".tflite file", precision=Reading("int4"))
    assert reference_target(found) == "litert-cpu"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not count threads")
def test_threads_are_those_that_were_asked_for(monkeypatch):
    before = device_runner.os_threads()
    with LITERT_CPU.open(FP32, 2) as runner:
        assert device_runner.os_threads() == before + 1
        runner.infer({"image": images(1)})
        assert device_runner.os_threads() == before + 1
    monkeypatch.setattr(device_runner, "os_threads", lambda: 5)
    with pytest.raises(TargetUnavailable, match="asked for 2 threads and started 0"), LITERT_CPU.open(FP32, 2):
        pass


def test_a_session_runs_with_the_device_runner_alone(tmp_path):
    """As over ssh and in a bundle: the runner's own file, and nothing of slimvit."""
    schedule = {
        "schema": device_runner.SCHEDULE_SCHEMA,
        "seed": 0,
        "session": 0,
        "blocks": 2,
        "slot_ms": 1.0,
        "threads": 1,
        "warmup": {"calls": 3, "seconds": 0.0},
        "inputs": {"count": 2, "seed": 0, "tensors": [{"shape": [3, 3, 16, 16], "dtype": "float32"}]},
        "variants": [
            {"name": name, "path": str(path), "runtime": "litert-cpu", "inputs": ["image"]}
            for name, path in (("A", FP32), ("B", INT8))
        ],
    }
    got = device_runner.run_schedule(schedule)
    assert got["variants"]["A"]["outputs"] == [[3, 5]]
    assert all(ns > 0 for block in got["blocks"] for times in block["samples_ns"].values() for ns in times)
    schedule["inputs"]["tensors"][0]["shape"][0] = 2
    with pytest.raises(ValueError, match="it takes"):
        device_runner.run_schedule(schedule)


def test_a_damaged_file_is_refused_as_such(tmp_path):
    short = tmp_path / "short.tflite"
    short.write_bytes(FP32.read_bytes()[:-9000])
    with pytest.raises(ArtifactError, match=r"short\.tflite"), LITERT_CPU.open(short, 1):
        pass
    with pytest.raises(StorageError, match=r"gone\.tflite"), LITERT_CPU.open(tmp_path / "gone.tflite", 1):
        pass


def test_without_the_runtime_it_says_how_to_get_it(monkeypatch, tmp_path):
    for module in ("ai_edge_litert", "ai_edge_litert.interpreter", "ai_edge_litert.compiled_model"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (LITERT_CPU.probe, lambda: LITERT_CPU.open(tmp_path / "m.tflite", 1)):
        with pytest.raises(TargetUnavailable) as caught:
            call()
        assert (caught.value.reason, caught.value.install) == (
            "the Python module ai_edge_litert is not installed",
            "pip install 'slimvit[litert]'",
        )


@pytest.mark.parametrize(
    ("named_python", "words"),
    [
        ("", "SLIMVIT_LITERT_PYTHON names, and it is not set"),
        ("/no/such/python", "names /no/such/python, which cannot be run"),
        (shutil.which("false") or "/bin/false", "lacks what conversion needs: it said nothing"),
    ],
)
def test_without_a_converter_nothing_is_begun_and_the_lines_that_make_one_are_said(
    monkeypatch, tmp_path, named_python, words
):
    monkeypatch.setenv(converter.PYTHON, named_python)
    section = EngineSection(targets=("litert-cpu",))
    stage = BuildEngine(section, "litert-cpu", tmp_path / "out")
    with pytest.raises(TargetUnavailable, match=words) as caught:
        stage.requires(OnnxFile(FP32.with_suffix(".onnx")))
    assert caught.value.install.startswith("python -m venv ")
    assert "litert-torch" in caught.value.install
    assert LITERT_CPU.probe().details["convert"].startswith("no: ")
    assert LITERT_CPU.probe().cannot_run == "", "files run without it"
    assert not (tmp_path / "out").exists()


def test_another_torch_is_refused(monkeypatch, tmp_path):
    answer = json.dumps({"torch": "1.13.0", "litert-torch": "0.10.0", "ai-edge-quantizer": "0.10.0"})
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    monkeypatch.setenv(converter.PYTHON, str(python))
    with pytest.raises(TargetUnavailable, match=r"has torch 1\.13\.0, and programs come from"):
        converter.Converter.found("litert-cpu")


def exported(folder, model, precision="fp32"):
    channels, *size = model.preprocess.input_size
    metadata = {PREPROCESS: json.dumps(model.preprocess.to_dict())}
    path = folder / f"x.{precision}.onnx"
    export_onnx(model.module, path, input_size=(channels, *size), opset=20, metadata=metadata, simplify=True)
    if precision != "fp32":
        made = PRECISIONS[precision].convert(onnx.load(path), np.zeros((1, channels, *size), np.float32)).model
        onnx.helper.set_model_props(made, metadata | {PRECISION: precision})
        onnx.save(made, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", ["classic", "layer scale", "Swin", "DINOv3", "grouped queries"])
def test_structures_are_converted_and_proven(case, convertible, tmp_path):
    source = exported(tmp_path, variant(case))
    built = LITERT_CPU.build(source, tmp_path, BuildOptions((1, 1, 3)))
    verdict = rung(built.path, source)
    assert verdict.verdict == "pass", verdict.reason
    assert built.facts["fully_delegated"], case


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-dynamic"])
def test_a_stage_builds_each_precision_and_its_rung_passes(precision, convertible, tmp_path):
    source = exported(tmp_path, dense_model(), precision)
    section = EngineSection(targets=("litert-cpu",), batch=(1, 1, 3))
    stage = BuildEngine(
        section, "litert-cpu", tmp_path / "out", lambda built: _engine_rung(OnnxFile(source), built, (1, 1, 3), None)
    )
    given = OnnxFile(source)
    stage.requires(given)
    made = stage(given)
    stage.ensures(given, made.artifact)
    assert [each.verdict for each in made.rungs] == ["pass"]
    artifact = open_artifact(made.artifact.path)
    assert artifact.precision.name == precision
    assert artifact.precision.reason == ""
    assert artifact.batches == (1, 3)
    assert made.artifact.facts["fully_delegated"]
    assert artifact.layers["blocks.0.attn.proj"] > 0
    folded = "blocks.0.attn.qkv" not in artifact.layers
    assert folded == (precision == "fp32"), "of a rounded file every linear is the ONNX file's, and has its name"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8-dynamic"])
@pytest.mark.parametrize("case", ["layer scale", "attention pool"])
def test_constants_around_linears_are_in_rounded_weights(case, precision, convertible, tmp_path):
    """At a batch of 3 the converter would take them in by itself, and its weights would be unknown ones."""
    source = exported(tmp_path, variant(case), precision)
    built = LITERT_CPU.build(source, tmp_path, BuildOptions((1, 1, 3)))
    verdict = rung(built.path, source)
    assert verdict.verdict == "pass", verdict.reason
    layers = open_artifact(built.path).layers
    assert layers["blocks.0.attn.proj"] > 0
    assert "attn_pool.q" not in layers, "of a constant it is one"
    stored = 8 if case == "layer scale" else 12
    assert built.facts["matmul_dtypes"] == (
        {"HALF": stored + 2} if precision == "fp16" else {"FLOAT": 2, "INT8-DYNAMIC": stored}
    )


@pytest.mark.slow
def test_a_model_of_grey_images_has_the_weights_of_its_file(convertible, tmp_path):
    """Of one channel LiteRT makes a convolution for each output, whose weight lies otherwise."""
    source = exported(tmp_path, dense_model(**{**TINY, "in_chans": 1}), "fp16")
    built = LITERT_CPU.build(source, tmp_path, BuildOptions((1, 1, 3)))
    verdict = rung(built.path, source)
    assert verdict.verdict == "pass", verdict.reason
    assert built.facts["matmul_dtypes"] == {"HALF": 10}
    assert built.facts["fully_delegated"]
    assert open_artifact(built.path).layers["patch_embed.proj"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [3, 48])
def test_small_layer_scales_are_in_weights_of_fp16_or_refused(outputs, convertible, tmp_path):
    """As trained models have them at single outputs, and fresh ones everywhere."""
    model = variant("layer scale")
    with torch.no_grad():
        model.module.blocks[0].ls1.gamma[:outputs] = 1e-6
    source = exported(tmp_path, model, "fp16")
    if outputs == 48:
        with pytest.raises(
            ArtifactError, match=r"blocks\.0\.attn\.proj\.weight times the scale behind it comes to \S+ at most"
        ):
            LITERT_CPU.build(source, tmp_path, BuildOptions((1, 1, 3)))
        return
    verdict = rung(LITERT_CPU.build(source, tmp_path, BuildOptions((1, 1, 3))).path, source)
    assert verdict.verdict == "pass", verdict.reason


@pytest.mark.slow
def test_a_file_that_the_converter_spoilt_replaces_nothing(convertible, tmp_path, monkeypatch):
    source = exported(tmp_path, dense_model())
    convert = converter.Converter.convert

    def spoil(self, folder, what):
        versions = convert(self, folder, what)
        planted(folder / "model.tflite", folder, drop_bias)
        return versions

    monkeypatch.setattr(converter.Converter, "convert", spoil)
    section = EngineSection(targets=("litert-cpu",), batch=(1, 1, 1))
    stage = BuildEngine(
        section, "litert-cpu", tmp_path / "out", lambda built: _engine_rung(OnnxFile(source), built, (1, 1, 1), None)
    )
    with pytest.raises(ParityError):
        stage(OnnxFile(source))
    assert not (tmp_path / "out").exists()
