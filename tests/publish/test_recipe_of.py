"""A recipe without the places of one machine is the same recipe, and what a report does not know is not claimed."""

from __future__ import annotations

import tomllib

import pytest

from toolchain.publish.recipe_of import known, whole
from toolchain.recipe import Recipe
from toolchain.report.record import Data, Report

RECIPES = [
    {
        "model": {"name": "vit_tiny_patch16_224", "pretrained": False, "output": "layers", "layers": [2, 5]},
        "data": {"source": "imagefolder:/home/me/pictures", "classes": "/home/me/map.json", "mean": [0.5, 0.4, 0.3]},
        "train": {},
        "budget": {"params": 0.5, "latency": {"ort-cpu": "60%"}},
        "finetune": {"epochs": 3, "labels": False},
        "export": {"precisions": ["fp32", "int8-qdq"], "opset": 19, "accuracy_loss": 0.01},
        "engine": {"targets": ["trt-rtx"], "batch": [1, 2, 4]},
        "bench": {},
    },
    {
        "model": {"name": "local-dir:/home/me/model", "resample_patches": True},
        "data": {"source": "images:/home/me/pictures", "classes": "imagenet-12k"},
        "compress": {"method": "hybrid", "attention_share": 0.4, "neurons": "obs", "align": 16, "vtp": {"epochs": 2}},
        "budget": {"size": "12 MB"},
    },
    {
        "model": {"name": "vit_tiny_patch16_224", "checkpoint": "/home/me/weights.pt", "kwargs": {"img_size": 64}},
        "data": {"source": "hf:org/pictures:extra"},
        "compress": {"method": "none"},
        "bench": {"targets": []},
    },
    {"model": {"name": "hf-hub:org/name@v1"}, "data": {"source": "fashion-mnist"}, "budget": {"macs": 0.5}},
    {"model": {"name": "x"}, "data": {"source": "hf:/home/me/saved"}, "budget": {"macs": 0.5}},
]


@pytest.mark.parametrize("raw", RECIPES)
def test_a_whole_recipe_says_all_of_it_and_no_place(raw):
    recipe = Recipe.from_dict(raw)
    text = whole(recipe)
    again = Recipe.from_dict(tomllib.loads(text))
    assert again.digest == recipe.digest
    assert "/home/me" not in text
    assert again.model_dump(exclude={"model", "data"}) == recipe.model_dump(exclude={"model", "data"})


def test_paths_in_keyword_arguments_are_left_out():
    kwargs = {"pretrained_cfg_overlay": {"file": "/home/me/weights.pt", "crop_mode": "squash"}}
    text = whole(
        Recipe.from_dict({"model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs}, "budget": {"params": 0.5}})
    )
    assert tomllib.loads(text)["model"]["kwargs"] == {"pretrained_cfg_overlay": {"file": "PATH", "crop_mode": "squash"}}


@pytest.mark.parametrize(
    ("provenance", "model"),
    [
        ({"weights": "pretrained", "pretrained": "hf-hub:org/name@v1"}, {"name": "hf://org/name@v1"}),
        ({"weights": "pretrained", "pretrained": "local-dir"}, {"name": "local-dir:PATH"}),
        ({"weights": "pretrained", "pretrained": "local-dir:/home/me/model"}, {"name": "local-dir:PATH"}),
        ({"weights": "pretrained", "pretrained": "timm/vit_tiny"}, {"name": "vit_tiny_patch16_224"}),
        ({"weights": "initial"}, {"name": "vit_tiny_patch16_224", "pretrained": False}),
    ],
)
def test_what_is_known_names_where_the_weights_came_from(finished, provenance, model):
    raw = tomllib.loads(known(Report.load(finished), provenance))
    assert {key: value for key, value in raw["model"].items() if key != "kwargs"} == model


@pytest.mark.parametrize(
    ("kind", "source"),
    [("images", "images:PATH"), ("hf", "hf:NAME"), ("digits", "digits"), ("images-of-a-plugin",) * 2],
)
def test_what_is_known_names_the_kind_of_source(finished, kind, source):
    report = Report.load(finished)
    report = report.model_copy(update={"data": Data(source=kind, digest=report.data.digest)})
    assert tomllib.loads(known(report, {}))["data"]["source"] == source
