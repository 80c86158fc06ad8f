"""Kind: models without a classifier. Each output goes through a whole run, and what is said of it is what its files do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from builders import write_classifier
from PIL import Image
from sweeps import swept

from toolchain.artifacts import open_artifact
from toolchain.cli.main import main
from toolchain.errors import DataError, RecipeError
from toolchain.export.accuracy import accuracy_of, features_of
from toolchain.export.agreement import parity_of
from toolchain.export.calls import stack_images
from toolchain.export.preparation import source_for
from toolchain.gate import GateResult
from toolchain.parity import Tolerance
from toolchain.pipeline import run as pipeline
from toolchain.pipeline.job import prepare
from toolchain.recipe import Recipe
from toolchain.surgery.replay import load_model

SIZE = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}
RUNS = {
    "features": {"data": {"source": "imagefolder:classes"}, "finetune": {"epochs": 1, "batch_size": 32}},
    "tokens": {
        "data": {"source": "images:pictures"},
        "export": {"precisions": ["fp32", "int8-dynamic"], "simplify": False},
    },
    "layers": {
        "data": {"source": "imagefolder:classes"},
        "compress": {"allocation": "uniform", "align": 1},
        "export": {"simplify": False},
    },
}
MODEL = {"features": {}, "tokens": {"output": "tokens"}, "layers": {"layers": [0, 1]}}
NAMES = {"features": ["features"], "tokens": ["tokens"], "layers": ["layer_0", "layer_1"]}
EVERY = pytest.mark.parametrize("output", swept(RUNS, ["features"]))
EXAMPLE = Path(__file__).parents[2] / "examples" / "infer_onnx.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose blocks matter, unlabelled pictures, and the same in two classes: dark and bright."""
    root = tmp_path_factory.mktemp("features")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", **SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
            elif parameter.ndim > 1:
                parameter.mul_(3)
    torch.save(model.state_dict(), root / "m.pth")
    rng = np.random.default_rng(0)
    for index in range(100):
        pixels = rng.integers(0, 128, (4, 4, 3), dtype=np.uint8) + 127 * (index % 2)
        picture = Image.fromarray(pixels.astype(np.uint8)).resize((28, 28))
        for place in (root / "pictures", root / "classes" / ("bright" if index % 2 else "dark")):
            place.mkdir(parents=True, exist_ok=True)
            picture.save(place / f"{index}.png")
    return root


def recipe(folder, output="features", **sections):
    raw = {
        "model": {"name": "vit_small_patch14_dinov2", "kwargs": SIZE, "checkpoint": "m.pth", **MODEL[output]},
        "budget": {"params": 0.6},
        "compress": {"align": 4},
        **RUNS[output],
        **sections,
    }
    return Recipe.from_dict(raw, folder)


@pytest.fixture(scope="module")
def runs(folder):
    """Output → (its report, its folder), each run when it is first asked for."""
    done = {}

    def of(output):
        if output not in done:
            out = folder / f"run-{output}"
            done[output] = pipeline.run(recipe(folder, output), out).to_dict(), out
        return done[output]

    return of


def slimvit(*arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return end.value.code


def pictures(folder, count=16):
    stacked = np.stack([np.asarray(Image.open(folder / f"pictures/{index}.png"), np.float32) for index in range(count)])
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    return ((stacked / 255 - mean) / std).transpose(0, 3, 1, 2)


@EVERY
def test_a_run_gives_files_with_these_outputs_and_says_how_far_they_are(runs, folder, output):
    report, out = runs(output)
    assert report["output"] == output
    assert report["ratio"]["params"] <= 0.6
    assert {rung["verdict"] for rung in report["parity"]} == {"pass"}
    dense, small = (ort.InferenceSession(str(out / f"onnx/{name}.fp32.onnx")) for name in ("dense", "compressed"))
    model = load_model(out / "deploy")
    kind, _, place = RUNS[output]["data"]["source"].partition(":")
    test = source_for(f"{kind}:{folder / place}", model.preprocess).split("test")
    x = stack_images([test[index][0] for index in range(len(test))])
    y, z = (session.run(NAMES[output], {"image": x}) for session in (dense, small))
    errors = [((b - a) ** 2).sum() / ((a - a.mean(0)) ** 2).sum() for a, b in zip(y, z, strict=True)]
    features = report["compressed"]["features"]
    assert report["dense"]["features"]["error"] < 1e-9
    assert report["compressed"]["accuracy"] is None
    assert features["error"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert features["images"] == len(test)
    assert features["worst"]["error"] >= features["error"] > 0
    assert model.output_names == tuple(NAMES[output])
    text = (out / "report.md").read_text()
    assert "relative error of the features" in text
    assert "KL divergence" not in text
    assert "classifier" not in text


@EVERY
def test_neighbours_are_counted_where_there_are_labels(runs, output):
    report, _ = runs(output)
    knn = report["compressed"]["features"]["knn"]
    if output == "tokens":
        assert knn is None
    else:
        assert (knn["k"], knn["total"]) == (20, 20)
        assert min(knn["right"], knn["dense_right"]) >= 15, "dark and bright are easily told apart"
        assert any("Labels are not trained on: the outputs are" in note for note in report["notes"])


def test_features_are_fine_tuned_towards_the_dense_ones_without_labels(runs):
    report, _ = runs("features")
    tuning = report["finetune"]
    assert (tuning["loss"], tuning["judged_by"]) == ("imitation", "divergence")
    better = min(("before", "after"), key=tuning.get)
    assert 0 < tuning["after"] != tuning["before"] > 0
    assert tuning["kept"] == better, "by half the squared difference over the variance, on validation"


def test_int8_rounds_all_linears_of_a_model_without_a_last_one(runs):
    report, out = runs("tokens")
    (row,) = (row for row in report["artifacts"] if row["precision"] == "int8-dynamic")
    assert row["refused"] is None
    assert row["features"]["cosine"] > 0.9
    graph = onnx.load(out / row["path"]).graph
    assert sum(node.op_type == "MatMulInteger" for node in graph.node) == 8
    assert not any(node.op_type in ("Gemm", "MatMul") and "weight" in node.input[1] for node in graph.node)


@pytest.mark.slow
def test_two_artifacts_are_compared_output_by_output(runs):
    for output in RUNS:
        _, out = runs(output)
        dense, small, deploy = out / "onnx/dense.fp32.onnx", out / "onnx/compressed.fp32.onnx", out / "deploy"
        assert parity_of(small, deploy, "none").rung.verdict == "pass"
        assert parity_of(dense, small, "none").rung.verdict == "fail"


def planted(source, to, change):
    """A copy of a file of tokens in which `change` was done to the output, [batch, N, D]."""
    model = onnx.load(source)
    (value,) = model.graph.output
    node = next(node for node in model.graph.node if value.name in node.output)
    node.output[[*node.output].index(value.name)] = "before"
    model.graph.node.extend(change("before", value.name))
    onnx.save(model, to)
    return to


def one_token_moved(before, after):
    """The first token takes the place of the second in every image."""
    return [
        onnx.helper.make_node("Constant", [], ["order"], value_ints=[0, 0, 2, 3, 4]),
        onnx.helper.make_node("Gather", [before, "order"], [after], axis=1),
    ]


def one_token_dead(before, after):
    """The second token of every image is -1 in all channels."""
    ones = np.ones((1, 5, 1), np.float32)
    mask, shift = ones.copy(), np.zeros_like(ones)
    mask[0, 1], shift[0, 1] = 0, -1
    return [
        onnx.helper.make_node("Constant", [], ["mask"], value=onnx.numpy_helper.from_array(mask)),
        onnx.helper.make_node("Constant", [], ["shift"], value=onnx.numpy_helper.from_array(shift)),
        onnx.helper.make_node("Mul", [before, "mask"], ["masked"]),
        onnx.helper.make_node("Add", ["masked", "shift"], [after]),
    ]


def test_one_broken_token_is_not_lost_among_the_others(runs, tmp_path):
    source = runs("tokens")[1] / "onnx/compressed.fp32.onnx"
    broken = planted(source, tmp_path / "broken.onnx", one_token_moved)
    rung = parity_of(source, broken, "none", Tolerance(None, 0.9, None)).rung
    assert rung.verdict == "fail"
    assert "cosine" in rung.reason


def test_an_artifact_alone_is_judged_by_its_neighbours_and_beside_another_by_its_error(runs, folder, capsys):
    report, out = runs("features")
    source, small, dense = f"imagefolder:{folder / 'classes'}", out / "onnx/compressed.fp32.onnx", out / "dense"
    alone = features_of(small, source, "test").features
    knn = report["compressed"]["features"]["knn"]
    assert (alone.error, alone.knn.right, alone.knn.total) == (None, knn["right"], knn["total"])
    assert slimvit("evaluate", small, "--data", source, "--reference", dense, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    found = facts["features"]
    assert (facts["reference"], found["images"], found["knn"]["bank"]) == (str(dense), 20, 70)
    assert found["error"] == pytest.approx(report["compressed"]["features"]["error"], rel=1e-4)
    assert found["knn"]["dense_right"] == knn["dense_right"]
    assert slimvit("evaluate", small, "--data", source) == 0
    said = capsys.readouterr().out
    assert f"On {source} test:" in said
    assert f"k-NN, 20 of 70 training images: {knn['right']} of 20 images right" in said
    assert slimvit("evaluate", small, "--data", source, "--classes", "imagenet-1k") == 2
    assert "--classes maps folders to the classes of a classifier" in capsys.readouterr().err
    with pytest.raises(DataError, match="name the dense model with --reference"):
        features_of(small, f"images:{folder / 'pictures'}", "test")
    with pytest.raises(RecipeError, match="looked for in the training images, which hold calibration: name --split"):
        features_of(small, source, "calibration")
    held = features_of(small, source, "train", reference=dense)
    assert held.features.knn is None
    assert "k-NN is not counted: neighbours are looked for in the training images, which hold train." in held.notes
    with pytest.raises(RecipeError, match="gives pooled features, which have no accuracy"):
        accuracy_of(small, source, "test")


def write_gate(place, folder, baseline, artifact, bounds):
    (place / "gate.toml").write_text(
        f"""
[data]
source = "images:{folder / "pictures"}"
[baseline.dense]
path = "{baseline}"
sha256 = "{open_artifact(baseline).sha256}"
[[cell]]
name = "backbone"
artifact = "{artifact}"
baseline = "dense"
relation = {{ features = {{ {bounds} }} }}
"""
    )


def test_a_baseline_that_gives_the_same_for_every_image_proves_nothing(runs, folder, tmp_path, capsys):
    out = runs("tokens")[1]

    def constant(before, after):
        tensors = {"nothing": np.zeros((1, 5, 32), np.float32), "same": np.ones((1, 5, 32), np.float32)}
        given = [
            onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
            for name, value in tensors.items()
        ]
        still = onnx.helper.make_node("Mul", [before, "nothing"], ["zero"])
        return [*given, still, onnx.helper.make_node("Add", ["zero", "same"], [after])]

    same = planted(out / "onnx/dense.fp32.onnx", tmp_path / "same.onnx", constant)
    write_gate(tmp_path, folder, same, same, "cosine = 0.5")
    assert slimvit("gate", "-c", tmp_path / "gate.toml", "--json") == 1
    (check,) = json.loads(capsys.readouterr().out)["cells"][0]["checks"]
    assert (check["status"], "the same for every image" in check["reason"]) == ("fail", True)


@pytest.mark.parametrize(
    ("bounds", "change", "broken"),
    [
        ({"error": 1.1, "cosine": 0.5}, None, ""),
        ({"error": 0.5}, None, "relative error"),
        ({"cosine": 0.99999}, None, "cosine"),
        ({"error": 1.1, "cosine": 0.99999}, None, "cosine"),
        ({"error": 1.1}, one_token_moved, "relative error"),
        ({"cosine": 0.5}, one_token_dead, "cosine"),
    ],
    ids=["within", "error", "cosine", "the bound that broke", "planted", "dead"],
)
def test_a_gate_holds_features_against_the_baselines(runs, folder, tmp_path, capsys, bounds, change, broken):
    report, out = runs("tokens")
    known = report["compressed"]["features"]["worst"]["error"]
    bounds = {key: value * known if key == "error" else value for key, value in bounds.items()}
    artifact, dense = out / "onnx/compressed.fp32.onnx", out / "onnx/dense.fp32.onnx"
    if change is not None:
        artifact = planted(artifact, tmp_path / "planted.onnx", change)
    write_gate(tmp_path, folder, dense, artifact, ", ".join(f"{key} = {value}" for key, value in bounds.items()))
    code = slimvit("gate", "-c", tmp_path / "gate.toml", "--json", "--out", tmp_path / "gate.json")
    result = json.loads(capsys.readouterr().out)
    (check,) = result["cells"][0]["checks"]
    assert (code, check["name"], check["status"]) == (
        int(bool(broken)),
        "relation.features",
        "fail" if broken else "pass",
    )
    assert not broken or check["unit"] == broken
    assert "The features have a relative error of" in check["reason"]
    assert GateResult.load(tmp_path / "gate.json").exit_code == code


def test_the_example_ignores_no_option(runs, folder, tmp_path):
    picture = folder / "pictures/0.png"
    classifier = write_classifier(tmp_path / "digits.onnx")
    (tmp_path / "labels.txt").write_text("a")
    features = runs("features")[1] / "onnx/compressed.fp32.onnx"
    for arguments, words in (
        ([classifier, picture, "--features", tmp_path / "f.npz"], "has a classifier and gives no features"),
        ([features, picture, "--labels", tmp_path / "labels.txt"], "which have no classes"),
    ):
        done = subprocess.run([sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True)
        assert (done.returncode, words in done.stderr) == (1, True)


def test_the_example_gives_the_features_of_pictures(runs, folder, tmp_path):
    _, out = runs("layers")
    files = [folder / f"pictures/{index}.png" for index in (0, 1, 2)]
    model = out / "onnx/compressed.fp32.onnx"
    command = [sys.executable, EXAMPLE, model, *files, "--json", "--features", tmp_path / "f.npz"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    session = ort.InferenceSession(str(model))
    expected = session.run(["layer_0", "layer_1"], {"image": pictures(folder, 3)})
    stored = np.load(tmp_path / "f.npz")
    for name, values in zip(("layer_0", "layer_1"), expected, strict=True):
        np.testing.assert_allclose(stored[name], values, atol=1e-4)
    vectors = expected[1].mean(axis=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert [row["cosine"] for row in rows.values()] == pytest.approx((vectors @ vectors[0]).tolist(), abs=1e-4)
    assert rows[str(files[0])]["shapes"] == {"layer_0": [5, 32], "layer_1": [5, 32]}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"export": {"softmax": True}}, "export.softmax asks for probabilities, and the outputs are pooled features"),
        ({"model": {"name": "vit_small_patch14_dinov2", "kwargs": SIZE, "pretrained": False}, "train": {}}, r"\[train\] learns from labels, and the outputs are pooled features"),
        ({"finetune": {"epochs": 1, "distill": False}}, "set finetune.distill = true to learn from the dense model"),
        ({"compress": {"method": "vtp"}, "budget": {"params": 0.7}}, "'vtp' learns from labels, and the outputs are pooled features"),
        ({"compress": {"method": "hybrid", "neurons": "taylor", "allocation": "uniform"}}, "follows the loss of classes"),
    ],
)  # fmt: skip
def test_what_needs_classes_is_refused_before_any_work(folder, sections, words):
    with pytest.raises(RecipeError, match=words):
        prepare(recipe(folder, **sections))


def test_what_a_folder_and_a_file_are_is_told(runs, capsys):
    _, out = runs("layers")
    for path in (out / "deploy", out / "onnx/compressed.fp32.onnx"):
        assert slimvit("inspect", path, "--json") == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts.get("output", facts.get("metadata", {}).get("slimvit.output")) == "layers"


def renamed(source, to, names):
    """A copy of a file without some outputs, and without what slimvit says of its input if `None` is among the names to go."""
    model = onnx.load(source)
    kept = [value for value in model.graph.output if value.name not in names]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    if None in names:
        del model.metadata_props[:]
    onnx.save(model, to)
    return to


def test_an_int8_file_that_gives_little_more_than_the_dense_mean_is_not_the_model(runs, folder, tmp_path):
    out = runs("tokens")[1]
    whole, rounded = out / "onnx/compressed.fp32.onnx", out / "onnx/compressed.int8-dynamic.onnx"
    assert parity_of(whole, rounded, f"images:{folder / 'pictures'}").rung.verdict == "pass"
    mean = ort.InferenceSession(str(whole)).run(None, {"image": pictures(folder)})[0].mean(axis=0, keepdims=True)

    def averaged(before, after):
        tensors = {"little": np.full_like(mean, 0.01), "mean": 0.99 * mean}
        constants = [
            onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
            for name, value in tensors.items()
        ]
        moved = onnx.helper.make_node("Mul", [before, "little"], ["rest"])
        return [*constants, moved, onnx.helper.make_node("Add", ["rest", "mean"], [after])]

    constant = planted(rounded, tmp_path / "mean.onnx", averaged)
    rung = parity_of(whole, constant, f"images:{folder / 'pictures'}").rung
    assert (rung.verdict, "how outputs differ between images is lost" in rung.reason) == ("fail", True)


def test_a_file_that_lacks_a_layer_is_another_model(runs, folder, tmp_path):
    whole = runs("layers")[1] / "onnx/compressed.fp32.onnx"
    part = renamed(whole, tmp_path / "part.onnx", ["layer_0"])
    rung = parity_of(whole, part, "none").rung
    assert (rung.verdict, rung.reason) == ("fail", "part.onnx lacks layer_0 of compressed.fp32.onnx")
    with pytest.raises(RecipeError, match=r"gives layer_1 and .* gives layer_0, layer_1"):
        features_of(part, f"images:{folder / 'pictures'}", "test", reference=whole)


def test_what_cannot_be_held_against_a_reference_is_refused_by_name(runs, folder, tmp_path):
    source, tokens, pooled = (
        f"images:{folder / 'pictures'}",
        *(runs(each)[1] / "onnx/compressed.fp32.onnx" for each in ("tokens", "features")),
    )
    with pytest.raises(RecipeError, match=r"gives features \[32\] and .* gives tokens \[5, 32\] for an image"):
        features_of(pooled, source, "test", reference=tokens)
    other = onnx.load(pooled)
    how = next(entry for entry in other.metadata_props if entry.key == "slimvit.preprocess")
    how.value = json.dumps({**json.loads(how.value), "mean": [0.1, 0.1, 0.1]})
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(RecipeError, match=r"prepare images in other ways \(mean\)"):
        features_of(tmp_path / "other.onnx", source, "test", reference=pooled)
    said = next(entry for entry in other.metadata_props if entry.key == "slimvit.output")
    said.value = "logits"
    onnx.save(other, tmp_path / "classes.onnx")
    with pytest.raises(RecipeError, match=r"classes.onnx gives classes \(logits\), which are no features"):
        features_of(pooled, source, "test", reference=tmp_path / "classes.onnx")


def test_another_tools_file_is_given_the_images_of_the_reference(runs, folder, tmp_path):
    layers = runs("layers")[1] / "onnx/compressed.fp32.onnx"
    foreign = renamed(layers, tmp_path / "foreign.onnx", [None])
    judged = features_of(foreign, f"images:{folder / 'pictures'}", "test", reference=layers)
    assert judged.features.error < 1e-9
    assert any(
        "foreign.onnx does not say how images are prepared: it is given those of" in note for note in judged.notes
    )
