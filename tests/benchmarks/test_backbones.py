"""Cells of pretrained backbones, from a tiny model and made-up pictures: measured, taken up again, and made a page of."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import compressing
import numpy as np
import pytest
import timm
import torch
from benching import carry_out, changed
from inputs import Inputs
from judging import relative
from kinds import KINDS, backbone
from pages import page_of, real
from PIL import Image
from records import Results
from safetensors.torch import save_file
from suite import Suite

from toolchain.errors import RecipeError
from toolchain.pipeline.job import prepare

pytestmark = pytest.mark.slow

KWARGS = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2}
SUITE = """\
title = "Tiny backbones"
kind = "backbone"
page = "real"

[recovery]
epochs = 1
batch_size = 16
lr = 1e-3

[[cells]]
name = "dense"
settings = { "compress.method" = "none" }

[[cells]]
name = "dense"
task = "probe"
settings = { "compress.method" = "none" }

[[cells]]
name = "joint"
training = ["zero", "recovered"]
settings = { "compress.method" = "joint", "compress.allocation" = "uniform", "compress.align" = 1 }
grid = { "budget.params" = [0.5] }

[[cells]]
name = "joint"
task = "probe"
settings = { "compress.method" = "joint", "compress.allocation" = "uniform", "compress.align" = 1 }
grid = { "budget.params" = [0.5] }

[[cells]]
name = "dense"
task = "tokens"
precisions = ["int8-dynamic"]
settings = { "compress.method" = "none" }

[[cells]]
name = "joint"
task = "tokens"
precisions = ["fp32", "int8-dynamic"]
settings = { "compress.method" = "joint", "compress.allocation" = "uniform", "compress.align" = 1 }
grid = { "budget.params" = [0.5] }

[[cells]]
name = "sweep-taylor"
sweep = "taylor"
peer = true
settings = { "peer.taylor_batches" = 2, "peer.batch" = 16, "budget.params" = 0.5 }
grid = { "peer.loss" = ["view", "score"] }

[[cells]]
name = "taylor"
peer = true
best = ["taylor"]
settings = { "peer.taylor_batches" = 2, "peer.batch" = 16 }
grid = { "budget.params" = [0.5] }
"""


def textured(path, seed):
    """A picture of blocks in colours drawn for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((32, 32), Image.Resampling.BILINEAR).save(path)


def tiny(folder) -> Inputs:
    """A random backbone, and pictures of coloured blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, pictures = folder / "backbone.safetensors", folder / "pictures"
    if not weights.exists():
        torch.manual_seed(0)
        module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **KWARGS)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_file(module.state_dict(), weights)
        for n in range(60):
            textured(pictures / f"calibration/scene{n}_0.png", n)
        for n in range(12):
            textured(pictures / f"tuning/{'ab'[n % 2]}/{n}.png", 100 + n)
            textured(pictures / f"judge/{('objects_a', 'stamps_b')[n % 2]}/{n}.png", 200 + n)
            textured(pictures / f"drawings/{n}.png", 300 + n)
    sizes = {"labelled": "digits", "fit": 60, "tell": 30, "bank": 40}

    def decode(patches):
        return patches.mean(-1).reshape(len(patches), 1, 2, 2).sigmoid()

    model = {"name": "vit_tiny_patch16_224", "kwargs": KWARGS}
    return Inputs(model, weights, decode, pictures, "made up", **sizes, shown={"objects_a/0": "made up"})


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Tiny inputs, few images, and no process of its own for compressing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressing, "process", compressing.apart)
        patch.setattr(backbone.KIND, "inputs", tiny)
        patch.setattr(compressing, "SEEN", 40)
        patch.setattr(compressing, "HELD_OUT", 8)
        yield


@pytest.fixture(scope="module")
def measured(_small, tmp_path_factory):
    """A folder in which the tiny suite was measured: real.toml, results/, work/."""
    root = tmp_path_factory.mktemp("backbones")
    (root / "real.toml").write_text(SUITE)
    assert carry_out(root / "real.toml") == 0
    return root


def records(root):
    suite = Suite.load(root / "real.toml")
    return {cell.name: Results(root / "results").read("real", cell.name) for cell in suite.cells}


def test_the_dense_backbone_is_held_against_itself(measured):
    found = records(measured)["dense.features.zero"].result
    assert [relative(found["sets"][name]["class"]) for name in ("judge", "drawings", "tuning")] == [0, 0, 0]
    assert relative(found["sets"]["judge"]["saliency"]) == 0
    assert set(found["thumbnails"]) == set(found["maps"]) == {"objects_a/0"}
    assert "neighbours" not in found["sets"]["drawings"]


def test_a_compressed_backbone_has_half_of_the_parameters_and_an_error(measured):
    found = records(measured)
    for name in ("joint.features.params0.5.zero", "taylor.features.params0.5.zero"):
        result = found[name].result
        assert abs(result["params"] / result["dense"]["params"] - 0.5) < 0.03
        assert relative(result["sets"]["judge"]["class"]) > 0
        assert result["peak_bytes"] >= result["peak_bytes_loaded"] > 0
        assert "thumbnails" not in result
    errors = [
        relative(found[name].result["sets"]["tuning"]["class"])
        for name in found
        if name.startswith(("joint.f", "taylor."))
    ]
    assert min(errors) < errors[-1], "slimvit's are nearer than the peer's"


def test_no_more_images_are_seen_than_agreed_and_recovery_trains_on_the_same(measured):
    for name, record in records(measured).items():
        seen = record.result["seen"]
        assert seen["calibration"] + seen["validation"] <= 40, name
        assert seen["train"] == seen["calibration"]


def test_a_try_of_a_sweep_is_not_judged_and_the_best_on_the_tuning_set_is_taken(measured):
    found = records(measured)
    tries = [record for name, record in found.items() if name.startswith("sweep")]
    assert all(set(record.result["sets"]) == {"tuning"} for record in tries)
    best = min(tries, key=lambda record: relative(record.result["sets"]["tuning"]["class"]))
    assert (
        found["taylor.features.params0.5.zero"].definition["settings"]["loss"] == best.definition["tried"]["peer.loss"]
    )


def test_the_probe_counts_what_it_tells_apart_on_images_that_no_method_saw(measured):
    found = records(measured)
    for name in ("dense.probe.zero", "joint.probe.params0.5.zero"):
        probe = found[name].result["probe"]
        assert probe["test"]["total"] == probe["validation"]["total"] == probe["neighbours"]["total"] == 30
        assert not found[name].result["labels"]
    assert relative(found["dense.probe.zero"].result["probe"]["class"]) == 0
    assert found["dense.probe.zero"].result["probe"]["test"]["wrong"] < 27, "it guesses better than chance"


def test_what_is_recorded_is_not_measured_again_and_other_pictures_are(copied, capsys):
    assert carry_out(copied / "real.toml", "--dry-run") == 0
    assert "11 of 11" in capsys.readouterr().out
    results = Results(copied / "results")
    record = results.read("real", "dense.features.zero")
    results.save(changed(record, pictures_sha256="others"))
    assert carry_out(copied / "real.toml", "--dry-run") == 0
    assert "10 of 11" in capsys.readouterr().out


def test_the_page_has_every_row_the_sweep_and_the_maps(measured):
    suite = Suite.load(measured / "real.toml")
    files = page_of("real")(suite, Results(measured / "results"))
    page = files["README.md"]
    assert set(files) == {"README.md", "error.svg", "maps.svg"}
    rows = [line for line in page.splitlines() if line.startswith("| `") and "peer.loss" not in line]
    assert len(rows) == len([cell for cell in suite.cells if not cell.sweep])
    assert page.count("taken") == 1
    assert page.count("](error.svg)") == page.count("](maps.svg)") == 1
    images = [each for each in ET.fromstring(files["maps.svg"]).iter() if each.tag.endswith("image")]
    assert len(images) == 4, "the picture, and the maps of the dense backbone, joint at half, and the peer"
    ET.fromstring(files["error.svg"])
    assert str(measured) not in page + files["maps.svg"]


def test_the_figure_has_the_errors_of_photographs_without_those_of_cut_outs(measured, watched):
    calls = watched(real.panels, "lines")
    record = records(measured)["joint.features.params0.5.zero"]
    real.by_size([record])
    points = [panel.series[0].points[0] for call in calls for panel in call.arguments[0]]
    kinds = ("class", "patches", "saliency")
    assert points == [real.error(record, "judge", what, "objects_") for what in kinds]
    assert all(point != real.error(record, "judge", what) for point, what in zip(points, kinds, strict=True))


def test_the_probe_is_validated_on_no_image_that_the_method_saw(tmp_path, watched):
    (tmp_path / "real.toml").write_text(SUITE)
    suite, given = Suite.load(tmp_path / "real.toml"), tiny(tmp_path / "inputs")
    cell = next(cell for cell in suite.cells if cell.name == "dense.probe.zero")
    job = prepare(backbone.KIND.recipe(cell, suite, given, {}))
    seen, calls = compressing.narrowed(job), watched(backbone, "_right")
    backbone.probed(job.dense.module, seen, given, every=False)
    judged = [call.arguments[1] for call in calls]
    known = {int(at) for name in ("calibration", "validation") for at in seen.source.split(name).positions}
    assert len(judged[0]) == given.tell
    assert not known & set(judged[0].positions.tolist())
    assert known & set(job.source.split("validation").spread(given.tell).positions.tolist()), (
        "it would be, by even steps"
    )


def test_nothing_recorded_is_no_page(tmp_path):
    (tmp_path / "real.toml").write_text(SUITE)
    assert page_of("real")(Suite.load(tmp_path / "real.toml"), Results(tmp_path / "results")) == {}


def test_no_record_names_a_place_on_this_machine(measured):
    for record in records(measured).values():
        assert str(measured) not in repr(record.definition)


def test_a_sweep_that_there_is_not_is_refused(tmp_path):
    (tmp_path / "real.toml").write_text(SUITE.replace('best = ["taylor"]', 'best = ["none"]'))
    with pytest.raises(RecipeError, match="best of 'none'"):
        Suite.load(tmp_path / "real.toml")


def test_the_suites_kind_is_the_one_that_is_registered():
    assert KINDS["backbone"] is backbone.KIND


def test_a_file_is_judged_in_the_place_of_its_module_and_held_against_the_fp32_file(measured):
    found = records(measured)
    module, whole, small, dense = (
        found[f"{name}.zero"].result
        for name in (
            "joint.features.params0.5",
            "joint.tokens.params0.5.fp32",
            "joint.tokens.params0.5.int8-dynamic",
            "dense.tokens.int8-dynamic",
        )
    )
    assert small["file"]["bytes"] < whole["file"]["bytes"] < module["dense"]["bytes"]
    assert 0 < relative(dense["sets"]["judge"]["class"]) < relative(whole["sets"]["judge"]["class"])
    page = page_of("real")(Suite.load(measured / "real.toml"), Results(measured / "results"))["README.md"]
    section = page.partition("## Files")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "MB" in line]
    assert [row[:2] for row in rows] == [
        ["`dense`", "int8-dynamic"],
        ["`joint.params0.5`", "fp32"],
        ["`joint.params0.5`", "int8-dynamic"],
    ]
    assert [row[6] == "—" for row in rows] == [True, True, False]


@pytest.mark.parametrize("change", ['task = "features"', 'task = "tokens"\npeer = true'])
def test_files_are_only_of_all_tokens(tmp_path, change):
    (tmp_path / "real.toml").write_text(f'{SUITE}\n[[cells]]\nname = "x"\nprecisions = ["int4"]\n{change}\n')
    with pytest.raises(RecipeError, match="x has precisions, which need task = 'tokens'"):
        Suite.load(tmp_path / "real.toml")
