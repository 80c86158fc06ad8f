"""A run's repository: everything in it is of the run, and those for whom it is made read it."""

from __future__ import annotations

import json
import re
import shutil
import tomllib

import numpy as np
import onnx
import onnxruntime
import pytest
from hub_server import Repository, visited
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from toolchain.errors import ArtifactError, DataError, StorageError
from toolchain.publish.folder import FolderDestination
from toolchain.publish.push import push
from toolchain.publish.repository import repository
from toolchain.recipe import Recipe
from toolchain.report.record import Report

LABELS = [f"digit {index}" for index in range(10)]


@pytest.fixture(scope="module")
def files(finished):
    return repository(finished, "org/digits", labels=LABELS, license_="apache-2.0")


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("repository")
    push(files, FolderDestination(path), tool="slimvit 0", message="")
    return path


def card_of(files):
    return ModelCard(files["README.md"].data.decode())


def toml_of(text):
    return Recipe.from_dict(tomllib.loads(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1]))


def test_it_holds_what_the_hubs_readers_look_for(files):
    assert list(files) == [
        "README.md",
        "config.json",
        "onnx/model.onnx",
        "onnx/model_fp16.onnx",
        "onnx/model_quantized.onnx",
        "plan.json",
        "preprocessor_config.json",
    ]


@pytest.mark.parametrize(
    ("precision", "name"), [("fp32", "model"), ("fp16", "model_fp16"), ("int8-dynamic", "model_quantized")]
)
def test_its_files_compute_bit_for_bit_what_the_runs_files_do(finished, folder, precision, name):
    images = np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32)
    (ours,) = onnxruntime.InferenceSession(finished / f"onnx/compressed.{precision}.onnx").run(
        ["logits"], {"image": images}
    )
    (theirs,) = onnxruntime.InferenceSession(folder / f"onnx/{name}.onnx").run(["logits"], {"pixel_values": images})
    assert np.array_equal(ours, theirs)


@pytest.fixture
def large(finished, tmp_path, relisted):
    """The files of a run whose fp32 file keeps its weights beside it, as models above the 2 GB of a message do."""
    run = shutil.copytree(finished, tmp_path / "run")
    path = run / "onnx/compressed.fp32.onnx"
    model = onnx.load(path)
    path.unlink()
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=100)
    relisted(run)
    return repository(run, "org/large", labels=LABELS)


def test_weights_beside_a_file_are_found_by_their_new_name(files, large, tmp_path):
    """transformers.js looks for `model.onnx_data`, and is told so."""
    assert set(large) - set(files) == {"onnx/model.onnx_data"}
    told = json.loads(large["config.json"].data)["transformers.js_config"]
    assert told["use_external_data_format"] == {"model.onnx": 1}
    push(large, FolderDestination(tmp_path / "repository"), tool="slimvit 0", message="")
    session = onnxruntime.InferenceSession(tmp_path / "repository/onnx/model.onnx")
    whole = onnxruntime.InferenceSession(files["onnx/model.onnx"].data)
    images = {"pixel_values": np.ones((1, 1, 8, 8), np.float32)}
    assert np.array_equal(session.run(["logits"], images)[0], whole.run(["logits"], images)[0])


def test_transformers_reads_it(folder, finished):
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.num_labels, config.image_size, config.num_channels) == ("vit", 10, 8, 1)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 2)
    assert config.id2label == dict(enumerate(LABELS))
    processor = AutoImageProcessor.from_pretrained(folder)
    grey = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    pixels = processor(grey, return_tensors="np", input_data_format="channels_last")["pixel_values"]
    how = json.loads((finished / "deploy/model.json").read_text())["preprocess"]
    assert pixels == pytest.approx(((grey[None, None, ..., 0] / 255) - how["mean"][0]) / how["std"][0], abs=1e-5)


def test_the_front_of_the_card_is_what_hubs_read(files, finished):
    data, report = card_of(files).data, Report.load(finished)
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers.js",
        "image-classification",
    )
    assert {"onnx", "slimvit"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", report.compressed.accuracy)


def test_every_number_of_the_cards_tables_is_the_reports(files, finished):
    text, report = card_of(files).text, Report.load(finished)
    assert f"{report.compressed.params:,}" in text
    for row in report.artifacts:
        if row.model == "compressed":
            assert f"{100 * row.bytes / report.dense.bytes:.1f} %" in text
    assert f"{report.bench[0].compressed_ms:.3f}" in text
    assert str(finished) not in text, "a card does not say where a run lay"
    assert "int8-dynamic" in text


def test_the_cards_recipe_is_the_runs(files, finished):
    text = card_of(files).text
    assert "## How to make it again" in text
    assert toml_of(text) == Recipe.load(finished / "recipe.toml") == Recipe.load(finished.parent / "recipe.toml")


def test_without_a_recipe_the_card_has_what_the_report_knows_and_claims_no_more(finished, tmp_path):
    run, report = shutil.copytree(finished, tmp_path / "run"), Report.load(finished)
    (run / "recipe.toml").unlink()
    text = card_of(repository(run, "a/b")).text
    assert "## What is known of the recipe" in text
    assert "these parts are missing" in text
    assert "carries this recipe out" not in text
    recipe = toml_of(text)
    assert recipe.budget == report.budget
    assert recipe.model.kwargs == report.model.kwargs
    assert recipe.compress.method == report.requested_method
    assert recipe.model.pretrained is False
    assert recipe.data.source == "digits"


def test_a_recipe_that_is_not_the_runs_is_not_the_cards(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text().replace("epochs = 1", "epochs = 2"))
    assert "## What is known of the recipe" in card_of(repository(run, "a/b")).text, "that is not the run's"
    (run / "recipe.toml").write_text("[model")
    assert "## What is known of the recipe" in card_of(repository(run, "a/b")).text


def test_as_many_labels_as_classes(finished):
    assert json.loads(repository(finished, "a/b")["config.json"].data)["id2label"]["3"] == "LABEL_3"
    with pytest.raises(DataError, match="2 labels, and the model has 10 classes"):
        repository(finished, "a/b", labels=["x", "y"])


def test_two_classes_may_be_the_same_word(finished, tmp_path):
    """As "crane" is in ImageNet."""
    labels = ["crane", "x", "crane", "crane (2)", "crane", *"abcde"]
    files = repository(finished, "a/b", labels=labels)
    config = json.loads(files["config.json"].data)
    assert list(config["id2label"].values()) == labels
    assert list(config["label2id"]) == ["crane", "x", "crane (3)", "crane (2)", "crane (4)", *"abcde"]
    assert list(config["label2id"].values()) == list(range(10))
    push(files, FolderDestination(tmp_path / "there"), tool="slimvit 0", message="")
    read = AutoConfig.from_pretrained(tmp_path / "there")
    assert (read.num_labels, read.id2label) == (10, dict(enumerate(labels)))


@pytest.fixture
def changed(finished, tmp_path, relisted):
    """Makes a copy of the run whose report says something else."""

    def change(**changes):
        run = shutil.copytree(finished, tmp_path / "changed")
        report = json.loads((run / "report.json").read_text())
        (run / "report.json").write_text(json.dumps(report | changes))
        relisted(run)
        return run

    return change


@pytest.mark.parametrize(
    ("output", "task", "kind", "problem"),
    [
        ("multi-label", "image-classification", "ViTForImageClassification", "multi_label_classification"),
        ("regression", None, "ViTForImageClassification", "regression"),
        ("features", "image-feature-extraction", "ViTModel", None),
    ],
)
def test_outputs_that_are_no_classes_are_named(changed, output, task, kind, problem):
    files = repository(changed(output=output), "a/b")
    config = json.loads(files["config.json"].data)
    assert (config["architectures"], config.get("problem_type")) == ([kind], problem)
    card = ModelCard(files["README.md"].data.decode())
    assert card.data.pipeline_tag == task
    assert ("```js" in card.text) == (output == "features"), "pipelines of classes read a softmax"


def test_a_synthetic_run_claims_no_accuracy_and_says_what_it_is(changed):
    card = card_of(repository(changed(synthetic=True), "a/b"))
    assert card.data.eval_results is None
    assert "> Synthetic images: accuracy is unknown" in card.text


@pytest.mark.parametrize(
    "name",
    ["report.json", "plan.json", "deploy/model.json", "onnx/compressed.fp32.onnx", "onnx/compressed.fp32.onnx.data"],
)
def test_an_altered_run_is_not_pushed_with_the_numbers_of_the_original(finished, tmp_path, relisted, name):
    run = shutil.copytree(finished, tmp_path / "altered")
    if name.endswith(".data"):
        model = onnx.load(run / "onnx/compressed.fp32.onnx")
        onnx.save_model(
            model, run / "onnx/compressed.fp32.onnx", save_as_external_data=True, location=name[5:], size_threshold=100
        )
        relisted(run)
        repository(run, "a/b")
        content = bytearray((run / name).read_bytes())
        content[0] ^= 1
        (run / name).write_bytes(content)
    elif name.endswith(".onnx"):
        shutil.copyfile(run / "onnx/dense.fp32.onnx", run / name)
    else:
        (run / name).write_text((run / name).read_text() + "\n")
    with pytest.raises(
        ArtifactError, match=rf"^{re.escape(name)} of .* is not what manifest\.json lists, .*: run the recipe again$"
    ):
        repository(run, "a/b")


def test_snippets_name_the_repository_and_its_branch(files, finished):
    text = card_of(files).text
    assert text.count('"org/digits"') == 3
    assert "revision" not in text
    assert "ORG/NAME" not in text
    branch = card_of(repository(finished, "org/digits", revision="small")).text
    assert 'pipeline("image-classification", "org/digits", { dtype: "fp32", revision: "small" })' in branch
    assert 'from_pretrained("org/digits", revision="small")' in branch
    assert 'hf_hub_download("org/digits", "onnx/model.onnx", revision="small")' in branch


def test_snippets_do_not_name_a_folder_as_a_repository(finished):
    text = card_of(repository(finished, "here")).text
    assert text.count('"ORG/NAME"') == 3
    assert '"here"' not in text
    assert "Put the repository to which these files are pushed in place of ORG/NAME." in text


def python_of(files, name, tmp_path, monkeypatch):
    """The names that the Python of a card leaves, as it stands there, with a hub that has the files under a name."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "picture.jpg")
    program = re.search(r"```python\n(.*?)```", card_of(files).text, re.DOTALL)[1]
    names = {}
    push(files, FolderDestination(tmp_path / "pushed"), tool="slimvit 0", message="")
    with visited(monkeypatch, tmp_path / "cache") as hub:
        hub.repositories[name] = Repository()
        hub.repositories[name].branches["main"] |= {path: (tmp_path / "pushed" / path).read_bytes() for path in files}
        exec(program, names)
    return names


def test_the_python_of_a_card_runs(files, tmp_path, monkeypatch):
    assert python_of(files, "org/digits", tmp_path, monkeypatch)["outputs"].shape == (1, 10)


def test_the_python_of_a_card_fetches_weights_that_lie_beside_the_file(files, large, tmp_path, monkeypatch):
    (outputs,) = python_of(large, "org/large", tmp_path, monkeypatch)["outputs"]
    whole = onnxruntime.InferenceSession(files["onnx/model.onnx"].data)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "pushed")(Image.open("picture.jpg"), return_tensors="np")[
        "pixel_values"
    ]
    assert np.array_equal(outputs, whole.run(["logits"], {"pixel_values": pixels})[0][0])


def test_a_file_that_the_run_did_not_list_is_not_pushed(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "unlisted")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"] = [each for each in manifest["files"] if each["path"] != "plan.json"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"^plan\.json of .* is not what"):
        repository(run, "a/b")


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(StorageError, match="is not the folder of a finished run"):
        repository(tmp_path, "a/b")
