"""The names of classes go from a Hugging Face folder through a run's files to the repository that is pushed."""

from __future__ import annotations

import json

import onnx
import pytest
from transformers import ViTConfig, ViTForImageClassification

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.cli import main
from toolchain.errors import ArtifactError
from toolchain.outputs import CLASS_NAMES, CLASSES
from toolchain.pipeline.run import run
from toolchain.publish.repository import repository
from toolchain.recipe import ModelSection, Recipe
from toolchain.surgery.load import load_dense
from toolchain.surgery.replay import load_model

NAMES = ("tench, Tinca tinca", "crane", "Éclair", "crane", "ostrich", "hen")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}


def saved(folder, **more):
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8, **more)).save_pretrained(folder)
    return folder


def carried_out(checkpoint, out, **changes):
    recipe = {
        "model": {"checkpoint": str(checkpoint)},
        "data": {"source": "none"},
        "compress": {"method": "none"},
        "export": {"precisions": ["fp32", "fp16"]},
        **changes,
    }
    run(Recipe.from_dict(recipe), out)
    return out


SMALLER = {"compress": {"method": "hybrid", "neurons": "magnitude"}, "budget": {"params": 0.8}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("named")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMVIT_CACHE_DIR", str(root / "cache"))
        yield carried_out(saved(root / "hf", id2label=dict(enumerate(NAMES))), root / "run", **SMALLER)


@pytest.mark.slow
def test_every_model_and_every_file_of_a_run_has_them(finished):
    assert [tuple(load_model(finished / form).provenance[CLASS_NAMES]) for form in ("dense", "deploy")] == [NAMES] * 2
    files = sorted((finished / "onnx").glob("*.onnx"))
    assert len(files) == 3
    assert [OnnxFile(path).class_names for path in files] == [NAMES] * 3


def test_the_repository_has_them_unless_others_are_given(finished):
    written = json.loads(repository(finished, "a/b")["config.json"].data)
    assert written["id2label"] == {str(index): name for index, name in enumerate(NAMES)}
    assert written["label2id"]["crane (2)"] == 3
    others = json.loads(repository(finished, "a/b", labels=list("abcdef"))["config.json"].data)
    assert [*others["id2label"].values()] == list("abcdef")


def test_inspect_shows_the_first_of_them(finished, capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(finished / "onnx" / "dense.fp32.onnx")])
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "6: tench, Tinca tinca, crane, Éclair, crane, ostrich, …" in shown
    assert CLASSES not in shown


@pytest.mark.slow
def test_classes_without_names_have_none(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    out = carried_out(saved(tmp_path / "hf", num_labels=3), tmp_path / "run")
    assert OnnxFile(out / "onnx" / "dense.fp32.onnx").class_names == ()
    assert CLASSES not in OnnxFile(out / "onnx" / "dense.fp32.onnx").metadata
    written = json.loads(repository(out, "a/b")["config.json"].data)
    assert [*written["id2label"].values()] == ["LABEL_0", "LABEL_1", "LABEL_2"]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (
            {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "tench", "n3": "crane"}},
            ("tench", "n2", "crane"),
        ),
        ({"pretrained_cfg": {"label_names": ["a", "b", "c"]}}, ("a", "b", "c")),
        ({"label_names": ["a", "b"]}, ()),
        ({"label_names": {"a": 0}}, ()),
        ({"label_names": [1, 2, 3]}, ()),
        ({}, ()),
    ],
)
def test_timms_own_folders_name_classes_too(tmp_path, more, names):
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": {"depth": 1, "img_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
    section = ModelSection(name=f"local-dir:{tmp_path}")
    loaded = load_dense(section, weights=False, fetch=False, may_be_untrained=True)
    assert loaded.class_names == names
    assert loaded.provenance.get(CLASS_NAMES, []) == list(names)


@pytest.mark.slow
def test_features_have_none_either(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    folder = saved(tmp_path / "hf", id2label=dict(enumerate(NAMES)))
    out = carried_out(folder, tmp_path / "run", model={"checkpoint": str(folder), "output": "features"})
    assert OnnxFile(out / "onnx" / "dense.fp32.onnx").class_names == ()


@pytest.mark.parametrize("text", ["[", "{}", "[1, 2]", '"cat"'])
def test_damaged_names_are_refused(finished, tmp_path, text):
    model = onnx.load(finished / "onnx" / "dense.fp32.onnx")
    next(entry for entry in model.metadata_props if entry.key == CLASSES).value = text
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match=r"a.onnx has damaged metadata: slimvit.classes is no list of names"):
        _ = OnnxFile(tmp_path / "a.onnx").class_names
