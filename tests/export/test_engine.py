"""BuildEngine: an engine in a folder of its own, which is replaced whole and only where it is one."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import onnx as onnxlib
import pytest
from builders import DIGIT
from onnx import TensorProto, helper, numpy_helper

from toolchain.artifacts.onnx_file import PRECISION, PREPROCESS, OnnxFile
from toolchain.errors import ArtifactError, ParityError, RecipeError, StorageError
from toolchain.export.engine import BuildEngine
from toolchain.model import run_stage
from toolchain.parity import TOLERANCES, Rung
from toolchain.recipe import EngineSection
from toolchain.targets import TARGETS, BuildOptions, EngineBuild, Refittable, Target, TargetInfo


class Copier(Target):
    """A target whose engine is the ONNX file under a name of its own."""

    name, builds = "copier", ("FLOAT", "HALF")

    def __init__(self):
        self.content, self.products, self.chosen = b"engine", {"FLOAT": 4}, {}

    def probe(self):
        return TargetInfo("copier", "x", "1", "x")

    def _open(self, path, threads):
        raise NotImplementedError

    def _build(self, onnx, folder, options):
        path = folder / f"{onnx.stem}.sm{len(options.batch)}.engine"
        path.write_bytes(self.content)
        if not self.content:
            raise ArtifactError("no engine")
        facts = {"matmul_dtypes": self.products, "inspected_products": self.chosen, "inspector": {}}
        return EngineBuild(path, facts)


class Refitter(Copier, Refittable):
    """The same, with engines that take their weights later."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def _refit(self, stripped, onnx, folder):
        self.asked.append((stripped, onnx))
        return self._build(onnx, folder, BuildOptions())


@pytest.fixture
def target(register):
    copier = Copier()
    register(TARGETS, copier)
    return copier


STORED = {"fp32": np.float32, "fp16": np.float16, "int8-dynamic": np.int8, "int8-qdq": np.int8}


def write(path, precision="fp32"):
    """A file of slimvit's, of one linear whose weights are stored in a precision."""
    weights = [numpy_helper.from_array(np.ones((4, 4), STORED[precision]), "stored")]
    nodes = [helper.make_node("Cast", ["stored"], ["weight"], to=TensorProto.FLOAT)]
    if STORED[precision] is np.int8:
        weights.append(numpy_helper.from_array(np.float32(1), "scale"))
        nodes = [helper.make_node("DequantizeLinear", ["stored", "scale"], ["weight"])]
    nodes.append(helper.make_node("MatMul", ["image", "weight"], ["logits"]))
    image, logits = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in ("image", "logits"))
    model = helper.make_model(helper.make_graph(nodes, "g", [image], [logits], weights))
    for key, value in ((PREPROCESS, json.dumps(DIGIT.to_dict())), (PRECISION, precision)):
        model.metadata_props.add(key=key, value=value)
    path.parent.mkdir(exist_ok=True)
    onnxlib.save(model, path)
    return OnnxFile(path)


@pytest.fixture
def onnx(tmp_path):
    return write(tmp_path / "onnx" / "a.onnx").path


def build(onnx, folder):
    return run_stage(BuildEngine(EngineSection(), "copier", folder), OnnxFile(onnx)).artifact


def test_an_engine_replaces_the_earlier_one_whole(target, onnx, tmp_path):
    folder = tmp_path / "engine"
    made = build(onnx, folder)
    assert made.path == folder / "a.sm3.engine"
    assert json.loads((folder / "engine.json").read_text()) == made.facts
    build(onnx.rename(onnx.with_name("b.onnx")), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["b.sm3.engine", "engine.json"]


def test_a_build_that_fails_keeps_the_earlier_engine(target, onnx, tmp_path):
    made = build(onnx, tmp_path / "engine")
    target.content = b""
    with pytest.raises(ArtifactError, match="no engine"):
        build(onnx, tmp_path / "engine")
    assert made.path.read_bytes() == b"engine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "onnx"]


@pytest.mark.parametrize("verdict", ["fail", "pass", "not_run"])
def test_an_engine_that_is_not_the_model_replaces_nothing(target, onnx, tmp_path, verdict):
    earlier = build(onnx, tmp_path / "engine")
    assert earlier.facts["parity"] is None
    target.content, seen = b"another engine", []

    def compare(built):
        seen.append(built.path.read_bytes())
        return Rung("a.onnx", built.path.name, 1.0, None, None, TOLERANCES["fp32"], verdict, "planted")

    stage = BuildEngine(EngineSection(), "copier", tmp_path / "engine", compare)
    with pytest.raises(ParityError, match="planted") if verdict == "fail" else nullcontext():
        made = run_stage(stage, OnnxFile(onnx)).artifact
        assert made.facts["parity"]["verdict"] == verdict
        assert json.loads((tmp_path / "engine" / "engine.json").read_text()) == made.facts
    assert seen == [b"another engine"]
    assert earlier.path.read_bytes() == (b"engine" if verdict == "fail" else b"another engine")


def test_weights_are_put_into_a_stripped_engine_and_it_is_held_against_the_file(target, onnx, tmp_path, register):
    stripped, refitter = tmp_path / "stripped.engine", Refitter()

    def compare(_):
        return Rung("a.onnx", "a", 1.0, None, None, TOLERANCES["fp32"], "fail", "planted")

    stage = BuildEngine(EngineSection(), "copier", tmp_path / "engine", stripped=stripped)
    with pytest.raises(RecipeError, match="engines of copier have their weights"):
        run_stage(stage, OnnxFile(onnx))
    register(TARGETS, refitter)
    assert run_stage(stage, OnnxFile(onnx)).artifact.path.read_bytes() == b"engine"
    assert refitter.asked == [(stripped, onnx)]
    refitter.content = b"another"
    with pytest.raises(ParityError, match="planted"):
        run_stage(replace(stage, compare=compare), OnnxFile(onnx))
    assert (tmp_path / "engine" / "a.sm3.engine").read_bytes() == b"engine"


def test_a_target_without_engines_says_so(onnx, tmp_path):
    with pytest.raises(RecipeError, match="ort-cpu runs files as they are and has no engines"):
        run_stage(BuildEngine(EngineSection(), "ort-cpu", tmp_path / "engine"), OnnxFile(onnx))
    assert not (tmp_path / "engine").exists()


def test_a_folder_of_something_else_is_refused_and_left(target, onnx):
    before = onnx.read_bytes()
    with pytest.raises(StorageError, match=r"holds a\.onnx"):
        build(onnx, onnx.parent)
    assert [(path, path.read_bytes()) for path in onnx.parent.iterdir()] == [(onnx, before)]


def test_a_missing_file_is_named(target, tmp_path):
    with pytest.raises(StorageError, match=r"no\.onnx"):
        build(tmp_path / "no.onnx", tmp_path / "engine")


@pytest.mark.parametrize("products", [{"HALF": 3, "FLOAT": 1}, {"FLOAT": 4}, {}])
def test_an_engine_of_another_precision_is_refused(target, onnx, tmp_path, products):
    target.products = products
    with pytest.raises(ArtifactError, match="no fp16 engine: its matrix products are"):
        run_stage(BuildEngine(EngineSection(), "copier", tmp_path / "engine"), write(onnx, "fp16"))
    target.products = {"HALF": 4}
    run_stage(BuildEngine(EngineSection(), "copier", tmp_path / "engine"), write(onnx, "fp16"))


@pytest.mark.parametrize(
    ("name", "precision", "known"),
    [("trt-rtx", "int8-dynamic", "fp32, fp16, bf16, int8-qdq"), ("openvino-cpu", "int8-qdq", "fp32, fp16, bf16")],
)
def test_not_every_precision_becomes_an_engine(onnx, tmp_path, name, precision, known):
    with pytest.raises(RecipeError, match=f"engines of {name} are built from {known}$"):
        run_stage(BuildEngine(EngineSection(), name, tmp_path / "engine"), write(onnx, precision))


@pytest.mark.parametrize(
    ("chosen", "right"), [({"HALF": 4}, True), ({"HALF": 3, "FLOAT": 1}, False), ({"FLOAT": 4}, False), ({}, True)]
)
def test_what_the_inspector_says_counts_where_it_says_something(target, onnx, tmp_path, chosen, right, caplog):
    target.products, target.chosen = {"HALF": 4}, chosen
    stage = BuildEngine(EngineSection(), "copier", tmp_path / "engine")
    with nullcontext() if right else pytest.raises(ArtifactError, match="by the engine inspector"):
        run_stage(stage, write(onnx, "fp16"))
    assert ("recognises no matrix product" in caplog.text) == (not chosen), "silence is no proof, and is told"
