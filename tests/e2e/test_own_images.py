"""Folders of one's own pictures, from the recipe to the report."""

import datetime as dt
import json

import pytest
import timm
import torch
from PIL import Image

import toolchain
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.cli.main import app
from toolchain.errors import DataError, ModelError
from toolchain.export.accuracy import accuracy_of
from toolchain.files import read_json
from toolchain.gate import GateConfig, run_gate
from toolchain.pipeline.job import prepare
from toolchain.recipe import Recipe
from toolchain.surgery.replay import save_model

KWARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 6}
CELL = {"name": "subset", "budget": {"accuracy": 0.5}}


@pytest.fixture
def recipe(tmp_path):
    """A function from [data] to a recipe of a checkpoint whose answer is always class 3."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **KWARGS)
    with torch.no_grad():
        model.head.bias[3] = 50.0
    torch.save(model.state_dict(), tmp_path / "m.pth")

    def of(**data):
        raw = {"model": {"name": "vit_tiny_patch16_224", "kwargs": KWARGS, "checkpoint": "m.pth"}}
        return Recipe.from_dict(raw | {"data": data, "budget": {"params": 0.7}}, base=tmp_path)

    return of


def pictures(root, *folders, each=4):
    generator = torch.Generator().manual_seed(len(folders))
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            pixels = torch.randint(0, 256, (20, 24, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    return root


@pytest.mark.slow
def test_eight_pictures_are_enough(recipe, tmp_path):
    """Kind: few images. The comparison is not vacuous, since images of other splits are taken before any is repeated."""
    pictures(tmp_path / "eight", ".", each=8)
    report = toolchain.run(recipe(source="images:eight", exif_orientation=True, workers=2), tmp_path / "run")
    assert {rung.verdict for rung in report.parity} == {"pass"}
    fewer, few = report.notes
    assert fewer == "Calibration has 5 images, all of train; 512 were asked for."
    assert few.startswith("5 images are few to calibrate on")
    assert report.ratio.params < 0.71
    # What an app has to do is in every artifact.
    assert read_json(tmp_path / "run" / "deploy" / "model.json")["preprocess"]["exif_orientation"] is True
    assert OnnxFile(tmp_path / "run" / "onnx" / "compressed.fp32.onnx").preprocess.exif_orientation is True


@pytest.mark.parametrize(
    ("each", "colour", "what"),
    [
        (3, None, "3 images to train on and to split; at least 4"),
        (9, 7, "show 1 different pictures in all; at least 3"),
    ],
)
def test_too_few_pictures_are_refused_before_any_work(recipe, tmp_path, each, colour, what):
    """Kind: few images, or copies of one."""
    pictures(tmp_path / "few", ".", each=each)
    for path in (tmp_path / "few").iterdir() if colour is not None else ():
        Image.new("RGB", (8, 8), (colour,) * 3).save(path)
    with pytest.raises(DataError, match=what):
        toolchain.run(recipe(source="images:few"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_subset_of_the_classes_is_evaluated_over_all_outputs(recipe, tmp_path, capsys):
    """Kind: a subset of the model's classes. The labels are the model's class numbers, and any output can win."""
    pictures(tmp_path / "data", "train/cat", "train/dog", "val/cat", "val/dog")
    (tmp_path / "classes.json").write_text(json.dumps({"cat": 3, "dog": 1}))
    (tmp_path / "others.txt").write_text("dog\ncat")
    (tmp_path / "beyond.json").write_text(json.dumps({"cat": 3, "dog": 6}))
    data = {"source": "imagefolder:data", "classes": "classes.json"}
    job = prepare(recipe(**data))
    note = "Accuracy is over 2 of the model's 6 classes, by data.classes; any class can be predicted."
    assert note in job.source.notes
    folder = save_model(job.dense, tmp_path / "model")
    source, of = (
        f"imagefolder:{tmp_path / 'data'}",
        {name: str(tmp_path / name) for name in ("classes.json", "others.txt")},
    )
    right, other = (accuracy_of(folder, source, "test", classes=of[each]).accuracy for each in of)
    assert (right.wrong, right.total) == (4, 8)
    assert other.wrong == 8  # the answer is of neither class
    config = GateConfig.from_dict({"data": data, "cell": [{**CELL, "artifact": str(folder)}]}, tmp_path)
    ((_, check),) = run_gate(config, tool="test", day=dt.date(2026, 1, 1)).checks
    assert (check.value, check.status) == (4, "pass")
    with pytest.raises(ModelError, match="num_classes"):
        accuracy_of(folder, source, "test")
    with pytest.raises(ModelError, match="numbers up to 6, but the model's 6 outputs"):
        prepare(recipe(**data | {"classes": "beyond.json"}))
    line = ["evaluate", str(folder), "--data", source, "--classes", of["classes.json"], "--json"]
    app(line, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.5
