from __future__ import annotations

import predict
import torch
from kinds import KINDS, cost
from kinds.compression import epochs, kind_of, recorded_seconds
from records import Record
from suite import Suite

from toolchain.recipe import Recipe

SIZES = predict.Sizes(macs=1_000_000, train=1000, validation=100, test=200)


def recipes(path):
    suite = Suite.load(path)
    return {f"{cell.row}.{cell.training}": KINDS[cell.kind].recipe(cell, suite) for cell in suite.cells}


def test_more_work_is_predicted_to_take_longer(suite_file):
    found = {name: predict.passes(recipe, epochs(recipe), SIZES) for name, recipe in recipes(suite_file).items()}
    assert found["dense.zero"] == 2 * 100 + 200
    assert found["vtp.params0.7.zero"] == found["dense.zero"] + 3 * 1000
    assert found["joint.params0.5.recovered"] == found["joint.params0.5.zero"] + 4 * 1000
    assert found["joint.params0.5.zero"] > found["dense.zero"]
    recovered = recipes(suite_file)["joint.params0.5.recovered"]
    shared = predict.passes(recovered, epochs(recovered), SIZES, compressed=True)
    assert shared == found["dense.zero"] + 4 * 1000


def test_recorded_seconds_replace_the_prediction_for_cells_of_a_kind(suite_file):
    dumps = {name: recipe.model_dump(mode="json") for name, recipe in recipes(suite_file).items()}
    definition = {"recipe": dumps["vtp.params0.7.zero"], "peer": {}, "training": "zero"}
    records = [
        Record("tiny", f"cell{a}", "compression", "", definition, {}, {}, seconds={"a": a, "b": 1, "load": a + 1})
        for a in (1, 3)
    ]
    known = recorded_seconds(records)
    assert known == {kind_of(dumps["vtp.params0.7.zero"], {}, "zero"): 3}
    assert kind_of(dumps["joint.params0.5.zero"], {}, "zero") not in known


def test_the_matmul_rate_is_measured():
    rate = predict.matmul_rate(seconds=0.05, size=64)
    assert 1e6 < rate < 1e14


def test_smooth_noise_is_seeded_smooth_and_no_synthetic_source():
    first, again, other = (cost.smooth_noise((3, 56, 56), 4, seed) for seed in (0, 0, 1))
    assert not first.synthetic
    assert not first.labelled
    assert len(first.split("calibration")) == 4
    image, label = first.split("calibration")[1]
    assert label == -1
    assert image.shape == (3, 56, 56)
    assert torch.equal(image, again.split("calibration")[1][0])
    assert not torch.equal(image, other.split("calibration")[1][0])
    assert (image[:, 1:] - image[:, :-1]).square().mean() < 0.2 * image.var()
    shared = set(first.split("calibration").positions.tolist()) & set(first.split("validation").positions.tolist())
    assert shared == set()


def test_the_cost_of_a_tiny_model_is_measured():
    kwargs = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    recipe = Recipe.from_dict(
        {
            "model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs, "pretrained": False},
            "data": {"source": "none", "calibration_images": 8},
            "budget": {"params": 0.9},
        }
    )
    measured = cost.measured(recipe)
    found, seconds = measured["result"], measured["seconds"]
    assert found["blocks"] == 1
    assert found["params"] <= 0.9 * found["dense"]["params"]
    assert seconds["damage"] > 0
    assert seconds["closed form"] > 0
    assert found["peak_bytes"] >= found["peak_bytes_loaded"] > 0


def test_longer_calls_and_more_blocks_are_predicted_to_take_longer():
    assert (
        predict.comparison_seconds(0.2, 12) > predict.comparison_seconds(0.2, 6) > predict.comparison_seconds(0.01, 6)
    )
