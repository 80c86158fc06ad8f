"""Packages are built here and never run: what they compute is read back from them, and every fault in them shows."""

from __future__ import annotations

import json
import sys
import weakref
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from builders import STRUCTURES, shallow
from onnx import numpy_helper
from sweeps import swept

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.artifacts.onnx_plain import Codes, plain
from toolchain.errors import ArtifactError, RecipeError, TargetUnavailable
from toolchain.export.engine import BuildEngine
from toolchain.export.engine_parity import engine_rung
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.precision import PRECISIONS, opened_artifact
from toolchain.interpreter import graph_of, module_of
from toolchain.interpreter.mil import MilProgram
from toolchain.model import run_stage
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions, coreml
from toolchain.targets.coreml import COREML

OPTIONS = BuildOptions((1, 2, 8))


@pytest.fixture(scope="module", autouse=True)
def coremltools():
    """Loaded where these tests run and not where they are collected, since it takes seconds."""
    try:
        COREML.probe()
    except TargetUnavailable as error:
        pytest.skip(str(error))


def noise(size, count, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *size)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(structure, precision) → its ONNX file, with the metadata of a file that slimvit wrote."""
    folder = tmp_path_factory.mktemp("coreml")

    @cache
    def export(case="classic", precision="fp32"):
        if precision != "fp32":
            source = OnnxFile(export(case))
            path, images = source.path.with_suffix(f".{precision}.onnx"), noise(source.image.size, 8)
            model = PRECISIONS[precision].convert(onnx.load(source.path), images).model
            onnx.helper.set_model_props(model, {**source.metadata, "slimvit.precision": precision})
            onnx.save(model, path)
            return path
        model = shallow(case)
        path = folder / f"{len(list(folder.iterdir()))}.onnx"
        export_onnx(
            model.module,
            path,
            input_size=model.preprocess.input_size,
            opset=20,
            metadata={"slimvit.preprocess": json.dumps(model.preprocess.to_dict()), "slimvit.output": model.output},
            simplify=True,
            outputs=model.output_names,
        )
        return path

    return export


@pytest.fixture(scope="module")
def built(exported, tmp_path_factory):
    """(structure, precision) → (its ONNX file, its package)."""

    @cache
    def build(case="classic", precision="fp32"):
        onnx_file = exported(case, precision)
        return onnx_file, COREML.build(onnx_file, tmp_path_factory.mktemp("built"), OPTIONS)

    return build


@pytest.fixture(scope="module")
def int8(exported):
    """The int8-dynamic file of the plain model."""
    return exported("classic", "int8-dynamic")


def rung(onnx_file, engine, profile=(1, 2, 8)):
    source = OnnxFile(onnx_file)
    return engine_rung(source, engine, profile, lambda count: noise(source.image.size, count), None)


def by_stage(onnx_file, folder):
    """(the package of a file, its rung), by the stage that holds it to its precision."""
    section = EngineSection(targets=("coreml",), batch=OPTIONS.batch)
    stage = BuildEngine(section, "coreml", folder, lambda made: rung(onnx_file, made))
    done = run_stage(stage, OnnxFile(onnx_file))
    (found,) = done.rungs
    return done.artifact, found


def broken(engine, tmp_path, change):
    """The same engine after a change of the operations of its program."""
    package = open_artifact(engine.path)
    copied = tmp_path / engine.path.name
    for file in package.files:
        target = copied / file.relative_to(engine.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    package = open_artifact(copied)
    ((_, function),) = package.spec.mlProgram.functions.items()
    ((_, block),) = function.block_specializations.items()
    change(block.operations)
    package.model_path.write_bytes(package.spec.SerializeToString())
    return type(engine)(copied, engine.facts)


def first(operations, kind):
    return next(op for op in operations if op.type == kind)


# What a package is


@pytest.mark.matrix
@pytest.mark.parametrize("case", swept(STRUCTURES, ("classic",)))
def test_a_package_computes_its_file(case, built):
    onnx_file, engine = built(case)
    found = rung(onnx_file, engine)
    assert found.verdict == "pass", found.reason
    assert (found.tolerance.max_abs, found.max_abs > 0) == (1e-5, True)
    assert found.to == f"{engine.path.name}, interpreted in torch (not the Neural Engine's arithmetic)"
    assert set(engine.facts["matmul_dtypes"]) == {"FLOAT"}


@pytest.mark.matrix
@pytest.mark.parametrize("case", swept(STRUCTURES, ()))
def test_a_package_in_fp16_computes_its_file_to_the_rounding_of_fp16(case, exported, tmp_path):
    engine, found = by_stage(exported(case, "fp16"), tmp_path / "e")
    assert (found.verdict, found.tolerance) == ("pass", PRECISIONS["fp16"].tolerance)
    assert found.max_abs > 0, "fp16 rounds, and visibly"
    assert set(engine.facts["matmul_dtypes"]) == {"HALF"}
    assert set(engine.facts["weights"]) == {"f16"}


@pytest.mark.slow
def test_names_batch_and_metadata_are_those_of_the_file(built):
    onnx_file, engine = built("classic", "fp16")
    package, source = open_artifact(engine.path), OnnxFile(onnx_file)
    assert [(port.name, port.type, port.shape) for port in package.inputs] == [("image", "float32", (2, 3, 32, 32))]
    assert [(port.name, port.type) for port in package.outputs] == [("logits", "float32")]
    assert package.preprocess == source.preprocess is not None
    assert package.output == "logits"
    assert package.precision.name == "fp16"
    assert package.params == pytest.approx(source.params, rel=0.02), "constants of the converter apart"
    assert [package.image.batch] == engine.facts["batches"] == [*COREML.batches(OPTIONS)] == [2]
    assert {file.relative_to(engine.path).parts[0] for file in package.files} == {"Manifest.json", "Data"}
    assert package.size_bytes == sum(package.parts.values())
    wider = open_artifact(built()[1].path)
    assert wider.precision.name == "fp32"
    assert package.size_bytes < 0.7 * wider.size_bytes


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-dynamic"])
def test_a_package_alone_is_interpreted_where_outputs_are_asked_for(precision, built):
    """As `slimvit parity` and `slimvit evaluate` do, which know no file that it was built from."""
    onnx_file, engine = built("classic", precision)
    images = noise((3, 32, 32), 3)  # one call and a half
    package = open_artifact(engine.path)
    with opened_artifact(package) as run:
        got = run(images)["logits"]
    expected = module_of(plain(graph_of(onnx_file)).model)(torch.from_numpy(images)).numpy()
    bound = 1e-5 if precision == "fp32" else 2e-3
    assert np.abs(got - expected).max() <= bound * max(1.0, np.abs(expected).max())
    assert any("interpreted in torch" in note for note in package.notes)


def test_the_weights_of_a_package_are_those_of_the_file_as_fp16_rounds_them(exported, built):
    onnx_file, (_, engine) = exported(), built("classic", "fp16")
    wanted = {
        numpy_helper.to_array(each).astype(np.float16).tobytes()
        for each in onnx.load(onnx_file).graph.initializer
        if each.data_type == onnx.TensorProto.FLOAT and len(each.dims) == 1
    }
    program = MilProgram(engine.path)
    biases = [op.inputs["bias"].val for op in program._operations if op.op_type == "linear"]
    assert len(biases) == 5
    assert all(np.asarray(each, np.float16).tobytes() in wanted for each in biases)


def test_values_are_let_go_after_their_last_reader(built, monkeypatch):
    """Kind: an interpreter whose memory grows with the depth of the model."""
    program = MilProgram(built()[1].path)
    (name,) = program.input_names
    made, alive, declared = [], [], MilProgram._declared

    def counted(self, var, value):
        value = declared(self, var, value)
        made.append(weakref.ref(value))
        alive.append(sum(each() is not None for each in made))
        return value

    monkeypatch.setattr(MilProgram, "_declared", counted)
    program.infer({name: noise((3, 32, 32), 2)})
    assert len(made) > 20
    assert max(alive) <= 7, (
        "the residual, q, its one row in the last block, k, v, and what an operation reads and gives"
    )


# Int8 weights


def test_int8_weights_are_those_of_the_file_integer_for_integer(built):
    int8, engine = built("classic", "int8-dynamic")
    found = rung(int8, engine)
    assert (found.verdict, found.tolerance.cosine_min) == ("pass", 0.95)
    assert engine.facts["weights"] == {"f16": 2, "i8": 4}, "the patches and the head stay as they are"
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(int8).graph.initializer}
    wanted = sorted(array.T.tobytes() for array in stored.values() if array.dtype == np.int8 and array.ndim == 2)
    got = MilProgram(engine.path).codes
    assert sorted(codes.tobytes() for codes, _ in got.values()) == wanted
    package = open_artifact(engine.path)
    assert package.precision.name == "int8"
    assert package.params == open_artifact(built("classic", "fp16")[1].path).params, "scales are no parameters"


@pytest.fixture
def converting(monkeypatch):
    """Puts another converter in the place of Apple's."""
    return lambda other: monkeypatch.setattr(coreml, "_convert", other)


@pytest.mark.slow
@pytest.mark.parametrize("what", swept(["scale", "weight"], ["weight"]))
def test_a_wrong_scale_or_code_in_one_weight_fails_the_build(what, int8, tmp_path, converting):
    """Kind: a converter that rounds anew, or by another axis; cosines of the logits would hardly tell."""
    honest = coreml._convert

    def wrong(module, *others):
        (pair,) = [*module.parametrizations.values()][3]
        if what == "scale":
            pair.scale[0] *= 1.01
        else:
            [*module.parametrizations.values()][3].original.data[0] //= 2
        honest(module, *others)

    converting(wrong)
    with pytest.raises(ArtifactError, match=rf"the (int8 )?{what}.* not th(at|ose) of the file it was built from"):
        COREML.build(int8, tmp_path, OPTIONS)


def test_what_the_converter_raises_is_told_in_words(built, tmp_path, converting):
    def fails(*_):
        raise ValueError("Op of kind x is not supported\nand more")

    converting(fails)
    with pytest.raises(ArtifactError, match=r"cannot convert .*\.onnx: Op of kind x is not supported$"):
        COREML.build(built()[0], tmp_path, OPTIONS)


def test_codes_are_compared_weight_by_weight(built):
    int8, engine = built("classic", "int8-dynamic")
    program = MilProgram(engine.path)
    content = plain(graph_of(int8))
    codes = coreml.quantised(module_of(content.model), content.codes)
    coreml.require_codes(program, codes)
    one, *others = codes
    for planted, words in (
        ([Codes(one.codes + 1, one.scales), *others], "is not that of the file"),
        ([Codes(one.codes, one.scales * np.float32(1.01)), *others], "scales"),
        ([*others, one], "is not that of the file"),
        (others, "has 4 int8 weights, and its file 3"),
    ):
        with pytest.raises(ArtifactError, match=words):
            coreml.require_codes(program, planted)


# Planted faults


# Where outputs may differ most: by what fp16 rounds


def dropped_bias(operations):
    del first(operations, "linear").inputs["bias"]


def ignored_operator(operations):
    gelu = first(operations, "gelu")
    gelu.type = "identity"
    del gelu.inputs["mode"]


def swapped_keys_and_values(operations):
    names = first(operations, "split").outputs
    names[1].name, names[2].name = names[2].name, names[1].name


@pytest.mark.parametrize("fault", [dropped_bias, ignored_operator, swapped_keys_and_values])
def test_a_fault_of_the_converter_fails_the_rung(fault, built, tmp_path):
    onnx_file, engine = built("classic", "fp16")
    found = rung(onnx_file, broken(engine, tmp_path, fault))
    assert found.verdict == "fail"
    assert found.reason.endswith("with no activation rounded")


@pytest.mark.slow
def test_what_fp16_costs_fails_no_package_and_hides_no_fault(exported, tmp_path):
    """A large number that all channels have in common, as trained streams do: fp16 rounds all else away with it."""
    model = onnx.load(exported("classic", "fp16"))
    (place,) = [each for each in model.graph.initializer if each.name.endswith("pos_embed")]
    place.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(place) + np.float16(8), place.name))
    onnx.save(model, tmp_path / "large.onnx")
    (tmp_path / "built").mkdir()
    engine = COREML.build(tmp_path / "large.onnx", tmp_path / "built", OPTIONS)
    found = rung(tmp_path / "large.onnx", engine)
    assert (found.verdict, found.max_abs > 2e-3) == ("pass", True), found
    found = rung(tmp_path / "large.onnx", broken(engine, tmp_path, dropped_bias))
    assert found.verdict == "fail"


def test_a_swapped_head_fails_the_rung(exported, built, tmp_path):
    model = onnx.load(exported())
    (name,) = [node.input[1] for node in model.graph.node if node.op_type == "Gemm"][:1]
    tensor = next(each for each in model.graph.initializer if each.name == name)
    weight = numpy_helper.to_array(tensor).copy()  # 3 heads of 16 each in queries, keys and values
    axis = weight.shape.index(144)
    values = np.moveaxis(weight, axis, 0)
    values[96:112], values[112:128] = values[112:128].copy(), values[96:112].copy()
    tensor.CopyFrom(numpy_helper.from_array(weight, name))
    onnx.save(model, tmp_path / "swapped.onnx")
    assert rung(tmp_path / "swapped.onnx", built()[1]).verdict == "fail"


def test_an_operator_that_is_not_understood_is_named(built, tmp_path):
    def other(operations):
        gelu = first(operations, "gelu")
        gelu.type = "softsign"
        del gelu.inputs["mode"]

    engine = broken(built()[1], tmp_path, other)
    with pytest.raises(ArtifactError, match="is a softsign, which the interpreter of Core ML programs does not"):
        COREML.interpret(engine.path)


def test_a_damaged_package_is_refused_as_such(built, tmp_path):
    engine = broken(built()[1], tmp_path, lambda _: None)
    package = open_artifact(engine.path)
    package.model_path.write_bytes(package.model_path.read_bytes()[:-50])
    with pytest.raises(ArtifactError, match=r"\.mlpackage is no Core ML"):
        COREML.interpret(engine.path)


# What is refused


def test_nothing_runs_and_the_reason_is_told(built):
    _, engine = built()
    assert COREML.probe().cannot_run.startswith("needs macOS: Core ML computes on Apple's devices alone")
    assert not COREML.measures
    assert (engine.record.loaded, bool(engine.record.loaded_reason)) == ("not_run", True)
    with pytest.raises(TargetUnavailable, match="not run here"):
        COREML.open(engine.path, 1)


def test_a_file_that_takes_pixels_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info
    kinds = onnx.TensorProto
    node = onnx.helper.make_node("Cast", ["image"], ["logits"], to=kinds.FLOAT)
    graph = onnx.helper.make_graph(
        [node], "g", [value("image", kinds.UINT8, [1, 4, 4, 3])], [value("logits", kinds.FLOAT, [1, 4, 4, 3])]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match="uint8; Core ML takes float32"):
        COREML.build(tmp_path / "m.onnx", tmp_path, OPTIONS)


def test_no_onnx_file_makes_no_package(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"bad\.onnx"):
        COREML.build(tmp_path / "bad.onnx", tmp_path, OPTIONS)


def test_without_coremltools_it_says_how_to_get_it(exported, monkeypatch, tmp_path):
    source = OnnxFile(exported())

    monkeypatch.setitem(sys.modules, "coremltools", None)
    calls = (
        COREML.probe,
        lambda: COREML.build(tmp_path / "m.onnx", tmp_path, OPTIONS),
        lambda: COREML.interpret(tmp_path / "m.mlpackage"),
        lambda: BuildEngine(EngineSection(targets=("coreml",)), "coreml", tmp_path / "e").requires(source),
    )
    for call in calls:
        with pytest.raises(TargetUnavailable) as caught:
            call()
        assert (caught.value.reason, caught.value.install) == (
            "the Python module coremltools is not installed",
            "pip install 'slimvit[coreml]'",
        )
