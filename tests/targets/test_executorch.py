"""Programs of ExecuTorch: one delegate, the file's numbers, and nothing that is left out silently."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import STRUCTURES, dense_model, shallow, write_stack
from onnx import TensorProto, numpy_helper

from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.artifacts.onnx_plain import plain
from toolchain.artifacts.pte import MAGIC
from toolchain.cli.stages import _engine_rung
from toolchain.errors import ArtifactError, ParityError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.engine import BuildEngine
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.quantise import int8_dynamic
from toolchain.on_device.runner import OrtRunner
from toolchain.recipe import EngineSection
from toolchain.targets import BuildOptions
from toolchain.targets.executorch.int8 import require_codes
from toolchain.targets.executorch.reading import FLOAT, INT8, linears_of
from toolchain.targets.executorch.target import EXECUTORCH_XNNPACK, INSTALL, NAME

pytestmark = pytest.mark.slow  # it compiles programs

MODEL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def there():
    """The target; skips, with its own reason, where it is not."""
    try:
        EXECUTORCH_XNNPACK.require_run()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    return EXECUTORCH_XNNPACK


@pytest.fixture(scope="module")
def files(there, tmp_path_factory):
    """(precision) → the ONNX file of one tiny model."""
    folder = tmp_path_factory.mktemp("executorch")

    @cache
    def written(precision):
        path = folder / f"tiny.{precision}.onnx"
        if precision == "fp32":
            module = dense_model(**MODEL).module
            export_onnx(module, path, input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
        else:
            onnx.save(int8_dynamic(onnx.load(written("fp32")), images(1)).model, path)
        return path

    return written


@pytest.fixture(scope="module")
def builds(there, files, tmp_path_factory):
    """(precision) → what is built of it, for batches of 1 and 3."""
    return cache(lambda precision: built(files(precision), tmp_path_factory.mktemp(precision)))


def built(path, folder, batch=(1, 1, 3)):
    made = EXECUTORCH_XNNPACK.build(path, folder, BuildOptions(batch))
    (folder / "engine.json").write_text(json.dumps(made.facts))
    return made


def images(batch, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 32, 32)).astype(np.float32)


def vectors(batch):
    return np.random.default_rng(1).standard_normal((batch, 32)).astype(np.float32)


def outputs(path, given):
    opened = EXECUTORCH_XNNPACK.open(path, 1) if path.suffix == ".pte" else OrtRunner(str(path), 1)
    with opened as runner:
        return runner.infer({"image": given})["logits"]


def rung(made, source):
    return _engine_rung(OnnxFile(source), made, (1, 1, 3))


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_fp32_is_the_file_to_rounding_at_any_batch(batch, files, builds):
    expected, got = (outputs(path, images(batch)) for path in (files("fp32"), builds("fp32").path))
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, float(np.abs(expected).max()))


@pytest.mark.parametrize("batch", [1, 3])
def test_int8_has_the_direction_of_the_file(batch, files, builds):
    expected, got = (outputs(each("int8-dynamic"), images(batch)) for each in (files, lambda name: builds(name).path))
    cosine = (expected * got).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(got, axis=1)
    assert cosine.min() >= 0.999
    assert np.abs(got - expected).max() > 0, "activations are rounded otherwise, and visibly"


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_a_plain_vit_is_one_delegate_and_its_rung_passes(precision, files, builds):
    made = builds(precision)
    assert rung(made, files(precision)).verdict == "pass"
    products = {"FLOAT": 5} if precision == "fp32" else {"INT8-DYNAMIC": 4, "FLOAT": 1}
    assert made.facts["matmul_dtypes"] == products
    assert made.facts["methods"] == {
        name: {"batch": batch, "delegates": 1, "outside": {}} for name, batch in (("forward", 1), ("forward_3", 3))
    }


def test_batches_share_their_weights(files, builds):
    weights = sum(numpy_helper.to_array(each).nbytes for each in onnx.load(files("fp32")).graph.initializer)
    assert weights <= builds("fp32").path.stat().st_size < 1.5 * weights, "two methods and their weights once"


def test_int8_numbers_are_those_of_the_file(files, builds):
    """Integer for integer, as they lie in the program."""
    content = builds("int8-dynamic").path.read_bytes()
    codes = [each for each in onnx.load(files("int8-dynamic")).graph.initializer if each.data_type == TensorProto.INT8]
    matrices = [numpy_helper.to_array(each) for each in codes if len(each.dims) == 2]
    assert len(matrices) == 4
    for each in matrices:
        assert np.ascontiguousarray(each.T).tobytes() in content
        assert each.astype(int).__abs__().max() == 64


def test_what_the_artifact_tells_without_executorch(files, builds, tmp_path):
    for precision in ("fp32", "int8-dynamic"):
        artifact = open_artifact(builds(precision).path)
        assert (artifact.name, artifact.precision.name) == ("pte", precision)
        assert artifact.signature(3) == open_artifact(files(precision)).signature(3)
        assert [port.name for port in artifact.outputs] == ["logits"]
        alone = open_artifact(Path(shutil.copy(artifact.path, tmp_path)))
        assert (alone.precision.name, alone.inputs) == (precision, artifact.inputs)
        with pytest.raises(RecipeError, match=r"batches of 1, 3, asked for 2.*engine\.batch"):
            artifact.signature(2)


# Planted faults


def change(model, name, how):
    """A copy of a model in which one initializer is what `how` makes of it."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for each in other.graph.initializer:
        if each.name == name:
            each.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(how(numpy_helper.to_array(each))), name))
            return other
    raise AssertionError(f"no initializer {name}")


def projection(model):
    """The initializer that the heads' outputs are multiplied by: the one of [width, width]."""
    (name,) = (each.name for each in model.graph.initializer if list(each.dims) == [32, 32])
    return name


FAULTS = {
    "a dropped bias": lambda model: change(model, "head.bias", np.zeros_like),
    "swapped heads": lambda model: change(model, projection(model), lambda weight: np.roll(weight, 16, axis=0)),
    "a wrong scale": lambda model: change(model, "blocks.0.norm2.weight", lambda weight: weight * 1.01),
}


@pytest.fixture
def faulty(files, tmp_path):
    """(fault) → the file of fp32 with that fault in it."""

    def write(fault):
        path = tmp_path / "faulty.onnx"
        onnx.save(FAULTS[fault](onnx.load(files("fp32"))), path)
        return path

    return write


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_of_another_model_fails_the_rung(fault, faulty, builds):
    assert rung(builds("fp32"), faulty(fault)).verdict == "fail"


def test_a_fault_of_the_converter_fails_the_rung_and_writes_nothing(faulty, files, tmp_path):
    section = EngineSection(targets=(NAME,), batch=(1, 1, 1))
    stage = BuildEngine(section, NAME, tmp_path / "engine", partial(rung, source=files("fp32")))
    with pytest.raises(ParityError, match=r"max \|Δ\|"):
        stage(OnnxFile(faulty("swapped heads")))
    assert not (tmp_path / "engine").exists()


def test_an_operator_that_is_passed_over_fails_the_rung(files, tmp_path, monkeypatch):
    program = importlib.import_module("toolchain.targets.executorch.program")
    monkeypatch.setitem(program.REWRITES, "Gelu", lambda _, x: x)
    assert rung(built(files("fp32"), tmp_path, (1, 1, 1)), files("fp32")).verdict == "fail"


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic"])
def test_a_linear_that_becomes_something_else_is_no_program(precision, files, builds):
    """Kind: a product that no method has among its linears, whose numbers may be right."""
    program = importlib.import_module("toolchain.targets.executorch.program")
    content, found = plain(onnx.load(files(precision))), linears_of(builds(precision).path.read_bytes())
    path, methods = files(precision), {name: found[name] for name in ("forward", "forward_3")}
    assert program._products(path, methods, content) == builds(precision).facts["matmul_dtypes"]
    fewer = {name: [each for each in linears if each.shape != (5, 32)] for name, linears in methods.items()}
    with pytest.raises(ArtifactError, match=r"method forward: XNNPACK multiplies by weights of .*, the ONNX file by"):
        program._products(path, fewer, content)


def first(change):
    """The int8 linears of a program, of which the first is another."""

    def plant(codes):
        name = next(iter(codes))
        return {**codes, name: replace(codes[name], **change(codes[name]))}

    return plant


WRONG = {
    "a code": (
        first(lambda each: {"codes": np.roll(each.codes, 1)}),
        "method forward: the int8 numbers of '.*' are not",
    ),
    "a scale": (
        first(lambda each: {"scales": each.scales * np.float32(1.0001)}),
        "method forward: the scales of '.*' are not",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_an_int8_linear_that_is_not_the_files_is_no_program(fault, files, builds):
    program = importlib.import_module("toolchain.targets.executorch.program")
    plant, words = WRONG[fault]
    path, found = files("int8-dynamic"), linears_of(builds("int8-dynamic").path.read_bytes())
    content, methods = plain(onnx.load(path)), {name: found[name] for name in ("forward", "forward_3")}
    with pytest.raises(ArtifactError, match=words):
        program._products(path, methods, replace(content, codes=plant(content.codes)))


def test_a_linear_that_is_left_in_fp32_is_no_program(files, builds):
    program = importlib.import_module("toolchain.targets.executorch.program")
    path, found = files("int8-dynamic"), linears_of(builds("int8-dynamic").path.read_bytes())["forward"]
    at = next(index for index, each in enumerate(found) if each.kind == INT8)
    left = [*found[:at], replace(found[at], kind=FLOAT), *found[at + 1 :]]
    with pytest.raises(ArtifactError, match=r"method forward: the int8 numbers of '.*' are not"):
        program._products(path, {"forward": left}, plain(onnx.load(path)))


def test_such_a_linear_stops_the_build(unusual, tmp_path, monkeypatch):
    program = importlib.import_module("toolchain.targets.executorch.program")
    (plant, words), place = WRONG["a scale"], program.with_codes
    monkeypatch.setattr(program, "with_codes", lambda exported, feeds, codes: place(exported, feeds, plant(codes)))
    with pytest.raises(ArtifactError, match=words):
        built(unusual, tmp_path, (1, 1, 1))


def test_what_is_held_against_the_file_are_the_bytes_that_were_written(files, builds):
    codes = plain(onnx.load(files("int8-dynamic"))).codes
    content = builds("int8-dynamic").path.read_bytes()
    for method in ("forward", "forward_3"):
        require_codes(method, linears_of(content)[method], codes.items())
    name, each = next(iter(codes.items()))
    for part, what in ((each.codes.T.tobytes(), "int8 numbers"), (each.scales.tobytes(), "scales")):
        at = content.index(part) + len(part) // 2
        damaged = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        with pytest.raises(ArtifactError, match=f"the {what} of '{re.escape(name)}'"):
            require_codes("forward", linears_of(damaged)["forward"], codes.items())
    with pytest.raises(ArtifactError, match="1 int8 linears more"):
        require_codes("forward", linears_of(content)["forward"], [*codes.items()][1:])


@pytest.fixture(scope="module")
def unusual(there, tmp_path_factory):
    """An int8 file with a column of zeros, one scale for a whole matrix, and two linears that differ in their scales alone."""
    path = write_stack(tmp_path_factory.mktemp("unusual") / "m.onnx", width=32, layers=5)
    stack = onnx.load(path)
    for index, node in enumerate(stack.graph.node):
        node.name = f"linear{index}"
    model = int8_dynamic(stack, vectors(8)).model
    stored = {each.name: numpy_helper.to_array(each).copy() for each in model.graph.initializer}
    weights = [node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger"]
    whole, twice, hole, other = weights
    scales = {weight: weight.replace("_quantized", "_scale") for weight in weights}
    stored[hole][:, 3], stored[scales[hole]][3] = 0, 1  # as ONNX Runtime's quantiser has it
    stored[scales[whole]] = np.float32(stored[scales[whole]].max())
    stored[other], stored[scales[other]] = stored[twice], 2 * stored[scales[twice]]
    for each in model.graph.initializer:
        each.CopyFrom(numpy_helper.from_array(np.asarray(stored[each.name]), each.name))
    onnx.save(model, path)
    return path


def test_numbers_that_a_quantiser_would_choose_otherwise_are_kept(unusual, tmp_path):
    made = built(unusual, tmp_path, (1, 1, 1))
    assert made.facts["matmul_dtypes"] == {"INT8-DYNAMIC": 4, "FLOAT": 1}
    expected, got = (outputs(path, vectors(1))[0] for path in (unusual, made.path))
    assert expected @ got / np.linalg.norm(expected) / np.linalg.norm(got) >= 0.999
    written = linears_of(made.path.read_bytes())["forward"]
    (_, twice, hole, other, _), scales = written, [np.frombuffer(each.scales, np.float32) for each in written[:4]]
    assert twice.weight == other.weight
    assert np.array_equal(scales[3], 2 * scales[1])
    assert len(set(scales[0].tolist())) == 1
    assert scales[2][3] == 1
    assert not any(hole.weight[3 * 32 : 4 * 32])


@pytest.mark.parametrize("scale", [0.0, -0.01, np.inf, 1e-40])
def test_a_scale_that_xnnpack_does_not_take_is_refused_with_that_reason(scale, unusual, tmp_path):
    model = onnx.load(unusual)
    weight = next(node.input[1] for node in model.graph.node if node.op_type == "MatMulInteger")
    path = tmp_path / "scale.onnx"
    onnx.save(change(model, weight.replace("_quantized", "_scale"), lambda _: np.float32(scale)), path)
    with pytest.raises(ArtifactError, match=r"a scale of '.*' is .*; XNNPACK takes finite ones"):
        built(path, tmp_path, (1, 1, 1))


def test_a_linear_outside_of_the_delegate_is_no_program(files, tmp_path, monkeypatch):
    """Named by its weight, whatever the reason for which XNNPACK leaves it out."""
    partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    kinds = [
        kind
        for kind in partitioner.ALL_PARTITIONER_CONFIGS
        if kind.__name__ not in ("LinearConfig", "AddmmConfig", "MMConfig")
    ]
    monkeypatch.setattr(partitioner, "XnnpackPartitioner", partial(partitioner.XnnpackPartitioner, configs=kinds))
    with pytest.raises(ArtifactError, match=r"does not take the linear of '[\w.]+'"):
        built(files("fp32"), tmp_path, (1, 1, 1))


# What cannot be built or run is refused


def test_another_precision_is_refused(files, tmp_path):
    half = onnx.load(files("fp32"))
    half.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(
            numpy_helper.to_array(half.graph.initializer[0]).astype(np.float16), half.graph.initializer[0].name
        )
    )
    onnx.save(half, tmp_path / "half.onnx")
    with pytest.raises(RecipeError, match="16-bit weights"):
        built(tmp_path / "half.onnx", tmp_path)


def test_only_batches_that_were_built_are_timed(builds):
    with EXECUTORCH_XNNPACK.open(builds("fp32").path, 1) as runner:
        assert len(runner.time_ns([{"image": images(3)}], 4)) == 4
        with pytest.raises(RecipeError, match=r"got \{'image': \[2, 3, 32, 32\]\}"):
            runner.time_ns([{"image": images(2)}], 4)
        with pytest.raises(RecipeError, match=r"got \{'picture'"):
            runner.infer({"picture": images(1)})


def test_one_process_has_one_number_of_threads(builds):
    library = importlib.import_module("executorch.extension.pybindings.portable_lib")
    path = builds("fp32").path
    with (
        EXECUTORCH_XNNPACK.open(path, 1),
        pytest.raises(TargetUnavailable, match="2 were asked for, and it runs with 1"),
    ):
        EXECUTORCH_XNNPACK.open(path, 2).__enter__()
    with EXECUTORCH_XNNPACK.open(path, 2):
        assert library._threadpool_get_thread_count() == 2


def test_what_it_tells_of_itself_is_shown_only_where_a_file_is_not_opened(builds, tmp_path, capfd, caplog):
    for threads in (2, 1):
        with EXECUTORCH_XNNPACK.open(builds("fp32").path, threads) as runner:
            runner.infer({"image": images(1)})
    assert capfd.readouterr().err == ""
    assert not caplog.records
    other = tmp_path / "other.pte"
    other.write_bytes(builds("fp32").path.read_bytes().replace(MAGIC, b"ET99"))
    with pytest.raises(ArtifactError, match=r"other\.pte"):
        EXECUTORCH_XNNPACK.open(other, 1).__enter__()
    assert "ET99" in caplog.text


def test_who_only_runs_files_does_not_wait_for_the_compiler(there):
    """Its import takes three times as long as all else that a session of a device needs."""
    code = (
        "import sys\nfrom toolchain.on_device.runner import executorch_runtime\nexecutorch_runtime()\n"
        "assert not [name for name in sys.modules if name.startswith('executorch.exir.') and not name.endswith('_warnings')]\n"
        "assert 'executorch.exir' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_that_are_not_taken_are_refused(builds, monkeypatch):
    library = importlib.import_module("executorch.extension.pybindings.portable_lib")
    monkeypatch.setattr(library, "_unsafe_reset_threadpool", lambda _: None)
    with pytest.raises(TargetUnavailable, match="5 were asked for"):
        EXECUTORCH_XNNPACK.open(builds("fp32").path, 5).__enter__()


def test_a_file_of_others_is_refused(there, tmp_path):
    path = tmp_path / "x.pte"
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(ArtifactError, match=r"x\.pte"):
        EXECUTORCH_XNNPACK.open(path, 1).__enter__()
    with pytest.raises(StorageError, match=r"y\.pte"):
        EXECUTORCH_XNNPACK.open(tmp_path / "y.pte", 1).__enter__()


@pytest.mark.matrix
@pytest.mark.parametrize("case", STRUCTURES)
def test_every_structure_is_one_delegate_with_the_numbers_of_its_file(case, there, tmp_path):
    model, path = shallow(case), tmp_path / "m.onnx"
    size = model.preprocess.input_size
    export_onnx(model.module, path, input_size=size, opset=20, metadata={}, simplify=True, outputs=model.output_names)
    made = built(path, tmp_path, (1, 1, 1))
    verdict = rung(made, path)
    assert verdict.verdict == "pass", verdict.reason
    assert made.facts["methods"]["forward"] == {"batch": 1, "delegates": 1, "outside": {}}


@pytest.mark.parametrize("missing", ["executorch.runtime", "executorch.exir"])
def test_without_its_packages_it_says_how_to_get_them_before_any_work(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    absent = tmp_path / "absent"
    for call in (
        EXECUTORCH_XNNPACK.probe,
        lambda: EXECUTORCH_XNNPACK.open(absent, 1),
        lambda: EXECUTORCH_XNNPACK.build(absent, tmp_path, BuildOptions()),
    ):
        with pytest.raises(TargetUnavailable, match=f"{missing} is not installed") as caught:
            call()
        assert caught.value.install == INSTALL
