"""Probabilities as a second output: the softmax of the logits beside them, in every precision, and undone exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import dense_model

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import ArtifactError, ParityError, RecipeError
from toolchain.export import stage
from toolchain.export.agreement import parity_of
from toolchain.export.convert import Convert
from toolchain.export.probabilities import (
    gives_probabilities,
    probabilities_rung,
    with_probabilities,
    without_probabilities,
)
from toolchain.export.stage import Export
from toolchain.model import run_stage
from toolchain.recipe import ExportSection
from toolchain.surgery.replay import save_model
from toolchain.targets import get_target


def images(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the model's folder, what was exported with probabilities, the same without)."""
    folder = tmp_path_factory.mktemp("files")
    model = dense_model(num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=2)
    files = [
        run_stage(Export(ExportSection(softmax=softmax), folder / name, images(3), real_images=False, tool="t"), model)
        for name, softmax in (("both.onnx", True), ("logits.onnx", False))
    ]
    return save_model(model, folder / "model"), *files


def test_they_are_the_second_output_and_the_softmax_of_the_first(made):
    _, both, _ = made
    assert [rung.verdict for rung in both.rungs] == ["pass", "pass"]
    with get_target("ort-cpu").open(both.artifact.path, 1) as runner:
        found = runner.infer({"image": images(5, 1)})
    assert list(found) == ["logits", "probabilities"]
    expected = np.exp(found["logits"].astype(np.float64))
    expected /= expected.sum(axis=1, keepdims=True)
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-6)


def test_the_rest_of_the_graph_is_the_same_and_it_is_undone_exactly(made):
    folder, both, logits = made
    plain = onnx.load(logits.artifact.path)
    back = without_probabilities(onnx.load(both.artifact.path))
    assert back.graph.node == plain.graph.node
    assert back.graph.output == plain.graph.output
    assert without_probabilities(plain) is plain
    assert parity_of(folder, both.artifact.path, "none").rung.verdict == "pass"
    foreign = onnx.load(both.artifact.path)
    foreign.graph.node[-1].name = "theirs"
    with pytest.raises(ArtifactError, match="not by a node of slimvit's"):
        without_probabilities(foreign)


@pytest.mark.parametrize("name", ["fp16", "int8-dynamic", "int8-qdq", "int4"])
def test_every_precision_keeps_them_in_fp32(made, tmp_path, name):
    folder, both, _ = made
    convert = Convert(name, tmp_path / "x.onnx", images(32, 1), images(16, 2), real_images=False)
    converted = run_stage(convert, both.artifact)
    assert str(converted.rungs[-1]).startswith("softmax of the logits == x.onnx, probabilities: pass")
    model = onnx.load(converted.artifact.path)
    assert gives_probabilities(model)
    assert model.graph.node[-1].op_type == "Softmax"
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {onnx.TensorProto.FLOAT}
    assert parity_of(folder, converted.artifact.path, "none").rung.verdict == "pass"


def test_a_softmax_over_the_wrong_axis_is_caught_by_its_rung(made, tmp_path):
    _, both, _ = made
    model = onnx.load(both.artifact.path)
    model.graph.node[-1].attribute[0].i = 0
    onnx.save(model, tmp_path / "wrong.onnx")
    rung = probabilities_rung(tmp_path / "wrong.onnx", "ort-cpu", {"image": images(3)})
    assert rung.verdict == "fail"
    assert "off" in rung.reason


@pytest.mark.slow
def test_an_export_whose_probabilities_are_wrong_leaves_no_file(tmp_path, monkeypatch):
    def over_the_batch(model, output):
        model = with_probabilities(model)
        model.graph.node[-1].attribute[0].i = 0
        return model

    monkeypatch.setattr(stage, "with_probabilities", over_the_batch)
    model = dense_model(num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=1)
    export = Export(ExportSection(softmax=True), tmp_path / "x.onnx", images(3), real_images=False, tool="t")
    with pytest.raises(ParityError, match="probabilities"):
        run_stage(export, model)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_converted_is_taken_as_fp32(made, tmp_path):
    """The wrapper is taken off before a conversion, so that no converter rounds it."""
    _, both, logits = made
    for given, name in ((both, "a.onnx"), (logits, "b.onnx")):
        run_stage(Convert("fp16", tmp_path / name, images(8, 1), images(8, 2), real_images=False), given.artifact)
    a, b = (onnx.load(tmp_path / name) for name in ("a.onnx", "b.onnx"))
    assert list(a.graph.node)[:-1] == list(b.graph.node)
    assert isinstance(both.artifact, OnnxFile)


def test_independent_outputs_have_sigmoids(tmp_path):
    """Kind: outputs without classes. A softmax over yes-or-no outputs is wrong, and over a single one always 1."""
    model = dense_model(num_classes=1, img_size=32, patch_size=16, embed_dim=48, depth=1)
    model = replace(model, ref=model.ref.model_copy(update={"output": "multi-label"}))
    export = Export(ExportSection(softmax=True), tmp_path / "x.onnx", images(3), real_images=False, tool="t")
    made = run_stage(export, model)
    assert [rung.verdict for rung in made.rungs] == ["pass", "pass"]
    converted = run_stage(
        Convert("fp16", tmp_path / "half.onnx", images(3), images(5, 1), real_images=False), made.artifact
    )
    for path in (tmp_path / "x.onnx", converted.artifact.path):
        with get_target("ort-cpu").open(path, 1) as runner:
            found = runner.infer({"image": images(5, 1)})
        np.testing.assert_allclose(found["probabilities"], 1 / (1 + np.exp(-found["logits"])), atol=1e-6)
        assert np.ptp(found["probabilities"]) > 1e-4


def test_numbers_have_no_probabilities(tmp_path):
    """Kind: outputs without classes. Asking for the probabilities of a regression is refused before any work."""
    model = dense_model(num_classes=1, img_size=32, patch_size=16, embed_dim=48, depth=1)
    assert model.output == "regression"
    export = Export(ExportSection(softmax=True), tmp_path / "x.onnx", images(3), real_images=False, tool="t")
    with pytest.raises(RecipeError, match=r"the outputs are numbers \(regression\): set it to false"):
        run_stage(export, model)
