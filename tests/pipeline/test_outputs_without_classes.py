"""Kind: outputs that are no classes: one number, several numbers, a binary score, many yes-or-no outputs.

The softmax of one number is 1, so that by it every damage is 0, every width as good as any other, and two files always
the same model.
"""

from __future__ import annotations

import json
import re

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from PIL import Image

from toolchain.errors import ModelError, RecipeError
from toolchain.export.accuracy import accuracy_of
from toolchain.likelihood import outputs_of
from toolchain.pipeline import run as pipeline
from toolchain.pipeline.job import prepare
from toolchain.recipe import Recipe
from toolchain.surgery.replay import load_model

SIZE = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of 1 and of 5 outputs whose blocks matter, unlabelled pictures, and pictures of two classes."""
    root = tmp_path_factory.mktemp("outputs")
    for count in (1, 5):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", **SIZE, num_classes=count)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(8 if name == "head.weight" else 3)
        torch.save(model.state_dict(), root / f"{count}.pth")
    rng = np.random.default_rng(0)
    for index in range(120):
        picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
        for place in (root / "pictures", root / "classes" / ("no" if index % 2 else "yes")):
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{index}.png")
    return root


def recipe(folder, count=1, *, output=None, source="images:pictures", **sections):
    raw = {
        "model": {
            "name": "vit_tiny_patch16_224",
            "kwargs": {**SIZE, "num_classes": count},
            "checkpoint": f"{count}.pth",
        },
        "data": {"source": source},
        **({} if sections.get("compress") == {"method": "none"} else {"budget": {"params": 0.5}}),
        **sections,
        "compress": {"align": 1, **sections.get("compress", {})},  # of so few head dims, eight are all
    }
    if output is not None:
        raw["model"]["output"] = output
    return Recipe.from_dict(raw, folder)


def run(asked, out):
    report = pipeline.run(asked, out).to_dict()
    return report, json.loads((out / "allocation.json").read_text())


def pictures(count=64):
    rng = np.random.default_rng(1)
    small = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32)) for _ in range(count)]
    pixels = np.stack([np.asarray(each, np.float32) for each in small]) / 255
    return ((pixels - 0.5) / 0.5).transpose(0, 3, 1, 2)


def outputs(path, images):
    return ort.InferenceSession(str(path)).run(["logits"], {"image": images})[0]


def error(out):
    dense, small = (outputs(out / f"onnx/{name}.fp32.onnx", pictures()) for name in ("dense", "compressed"))
    return float(((small - dense) ** 2).sum() / ((dense - dense.mean(0)) ** 2).sum())


@pytest.mark.slow
def test_the_widths_of_a_regression_follow_from_its_squared_error(folder, tmp_path, caplog):
    report, allocation = run(recipe(folder), tmp_path / "solver")
    uniform, _ = run(recipe(folder, compress={"allocation": "uniform"}), tmp_path / "uniform")
    assert "one output, which is taken for a number" in caplog.text
    damages = [row["damage"] for row in allocation["widths"]]
    assert max(damages) > 1e-6, "no width is free"
    assert error(tmp_path / "solver") < error(tmp_path / "uniform"), "measured damage is worth something"
    # what the report says is what the file does, on pictures that nothing was chosen on
    assert report["output"] == "regression"
    assert report["compressed"]["error"] == pytest.approx(error(tmp_path / "solver"), rel=0.5)
    assert report["dense"]["error"] < 1e-9
    assert 0 < report["compressed"]["error"] < uniform["compressed"]["error"]
    assert report["compressed"]["accuracy"] is None
    text = (tmp_path / "solver" / "report.md").read_text()
    assert re.search(r"squared error of the outputs \| 0 \| [0-9.]+ % \| of the dense outputs' variance", text)
    assert "taken for a number" in text
    assert "half the squared difference over the variance from the dense model" in text
    assert "KL divergence" not in text
    assert all(rung["top1_agreement"] is None for rung in report["parity"])


@pytest.mark.slow
def test_a_regression_is_fine_tuned_towards_the_dense_numbers(folder, tmp_path):
    tuned = {"epochs": 2, "lr": 1e-4, "batch_size": 16}
    asked = recipe(folder, 5, output="regression", finetune=tuned, compress={"allocation": "uniform"})
    report, _ = run(asked, tmp_path)
    tuning, source = report["finetune"], prepare(asked).source
    assert (tuning["loss"], tuning["judged_by"]) == ("imitation", "divergence")
    dense, before = (load_model(tmp_path / name).module.eval() for name in ("dense", "masked"))
    spread = outputs_of(dense, source.split("calibration")).std(0)
    validation = source.split("validation")
    errors = (outputs_of(before, validation) - outputs_of(dense, validation)) / spread
    assert tuning["before"] == pytest.approx(float(errors.square().sum(1).mean() / 2), rel=1e-3)
    assert tuning["after"] != tuning["before"]
    assert not any("taken for a number" in note for note in report["notes"]), "it was declared"


@pytest.mark.slow
def test_many_yes_or_no_outputs_are_measured_by_their_sigmoids(folder, tmp_path):
    report, _ = run(
        recipe(folder, 5, output="multi-label", export={"softmax": True}, compress={"allocation": "uniform"}), tmp_path
    )
    assert report["output"] == "multi-label"
    assert 0 < report["compressed"]["error"] < 1
    session = ort.InferenceSession(str(tmp_path / "onnx/compressed.fp32.onnx"))
    logits, probabilities = session.run(["logits", "probabilities"], {"image": pictures(4)})
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert session.get_modelmeta().custom_metadata_map["slimvit.output"] == "multi-label"


@pytest.mark.slow
def test_a_binary_score_is_judged_by_the_sign_of_its_logit(folder, tmp_path):
    asked = recipe(folder, output="multi-label", source="imagefolder:classes", compress={"method": "none"})
    report, _ = run(asked, tmp_path)
    assert report["dense"]["total"] == 24
    path = tmp_path / "onnx/dense.fp32.onnx"
    source = f"imagefolder:{folder / 'classes'}"
    assert accuracy_of(path, source, "test").accuracy.wrong == report["dense"]["wrong"] == report["compressed"]["wrong"]
    assert set(accuracy_of(path, source, "test").accuracy.predictions.tolist()) == {0, 1}


def test_labels_of_classes_do_not_judge_numbers(folder, tmp_path):
    with pytest.raises(ModelError, match=r"labels of 2 classes, but the model's outputs are no classes.*images:PATH"):
        prepare(recipe(folder, source="imagefolder:classes"))
    job = prepare(recipe(folder, output="regression", source="imagefolder:classes"))
    assert not job.source.labelled
    assert int(job.source.split("test").labels.max()) == -1
    assert any("Labels are not read: the outputs are numbers" in note for note in job.source.notes)
    run(recipe(folder, compress={"method": "none"}), tmp_path)
    with pytest.raises(ModelError, match="no classes"):
        accuracy_of(tmp_path / "onnx/dense.fp32.onnx", f"imagefolder:{folder / 'classes'}", "test")


@pytest.mark.parametrize(
    ("sections", "error", "words"),
    [
        (
            {"export": {"softmax": True}},
            RecipeError,
            "export.softmax asks for probabilities, and the outputs are numbers",
        ),
        (
            {"compress": {"method": "hybrid", "neurons": "taylor", "allocation": "uniform"}},
            RecipeError,
            "'taylor' follows the loss of classes, and the outputs are numbers",
        ),
        (
            {"compress": {"method": "vtp"}, "budget": {"params": 0.7}},
            RecipeError,
            "learns from labels, and the outputs are numbers",
        ),
        (
            {"finetune": {"epochs": 1, "distill": False}},
            RecipeError,
            "needs labels, and the outputs are numbers",
        ),
    ],
)
def test_what_needs_classes_is_refused_before_any_work(folder, sections, error, words):
    with pytest.raises(error, match=words):
        prepare(recipe(folder, **sections))


@pytest.mark.slow
def test_gates_are_learned_by_the_loss_of_a_binary_score(folder, tmp_path):
    vtp = {"epochs": 1, "gate_lr": 0.05, "l1": 1e-3, "batch_size": 32}
    asked = recipe(
        folder,
        output="multi-label",
        source="imagefolder:classes",
        compress={"method": "vtp", "vtp": vtp},
        budget={"params": 0.7},
        finetune={"epochs": 1, "batch_size": 32},
    )
    report, _ = run(asked, tmp_path)
    assert report["finetune"]["loss"] == "distillation"
    assert report["ratio"]["params"] <= 0.7


@pytest.mark.parametrize(("output", "words"), [("regression", "numbers"), ("multi-label", "a yes or no each")])
@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"epochs": 1}},
        {"finetune": {"epochs": 1, "distill": False}},
        {"compress": {"method": "vtp"}, "budget": {"params": 0.7}},
    ],
    ids=lambda sections: next(iter(sections)),
)
def test_what_learns_from_labels_says_that_the_outputs_are_no_classes(folder, output, words, sections):
    """The pictures have labels; a message that they have none sends the user to look at the wrong place."""
    asked = recipe(folder, 5, output=output, source="imagefolder:classes", **sections)
    if "train" in sections:
        asked = asked.model_copy(
            update={"model": asked.model.model_copy(update={"checkpoint": "", "pretrained": False})}
        )
    with pytest.raises(RecipeError, match=rf"the outputs are {words} \(.*, which labels say nothing of[;:] .*"):
        prepare(asked)


def test_a_regression_on_six_pictures_has_no_error_to_tell(folder, tmp_path):
    """One test picture does not vary, so that there is nothing to hold an error against: a blank, and no crash."""
    few = tmp_path / "few"
    few.mkdir()
    for index in range(6):
        (few / f"{index}.png").write_bytes((folder / "pictures" / f"{index}.png").read_bytes())
    report, _ = run(recipe(folder, source=f"images:{few}", compress={"method": "none"}), tmp_path / "run")
    assert (report["dense"]["error"], report["dense"]["accuracy"]) == (None, None)


def test_the_softmax_of_one_number_is_not_accepted_by_name_either(folder):
    with pytest.raises(ModelError, match=r"softmax of one number is always 1: set model\.output"):
        prepare(recipe(folder, output="logits"))
