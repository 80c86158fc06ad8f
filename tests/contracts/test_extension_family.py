"""A family of two stages, a criterion, a factorisation and a precision from outside: each is one object and one registration."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_plugin
from builders import dense_model, problem_of, random_plan
from test_compress_contract import reproduced

from toolchain.compress.criteria import CRITERIA
from toolchain.compress.factorisations import FACTORISATIONS, factorise
from toolchain.compress.sensitivity import FLOOR, Sensitivity, sensitivities
from toolchain.compress.stage import Compress
from toolchain.cost import Widths, trace
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import ModelError, RecipeError
from toolchain.families import FAMILIES, family_of
from toolchain.likelihood import CATEGORICAL
from toolchain.model import run_stage
from toolchain.recipe import BudgetSection, CompressSection, FinetuneSection, VtpSection
from toolchain.surgery.mask import mask_model
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.stages import Finetune

OURS = ((FAMILIES, toy_plugin.FAMILY), (CRITERIA, toy_plugin.FIRST), (FACTORISATIONS, toy_plugin.CUT))
WAYS = {
    "joint": CompressSection(),
    "low rank": CompressSection(attention="data_aware"),
    "learned gates": CompressSection(method="vtp", vtp=VtpSection(epochs=1, batch_size=32)),
    "ours": CompressSection(attention="cut", neurons="first", allocation="uniform"),
    "ours, over all layers": CompressSection(attention="none", neurons="first", allocation="global"),
}


@pytest.fixture(autouse=True)
def registered():
    for registry, entry in OURS:
        registry.add(entry)
    yield
    for registry, entry in OURS:
        registry.discard(entry.name)


@pytest.fixture
def model():
    return dense_model("toy_two_stages", num_classes=10)


@pytest.fixture(scope="module")
def digits():
    """Few to train on and to judge by."""
    source = open_source("digits", Wanted((1, 8, 8), {}, calibration_images=32))
    few = {name: source.split(name).take(torch.arange(64)) for name in ("train", "validation")}
    return replace(source, splits={**source.splits, **few})


def images(source, count=5):
    return torch.stack([source.split("test")[index][0] for index in range(count)])


def close(a, b):
    return float((a - b).abs().max()) <= 1e-5 * max(1.0, float(a.abs().max()))


def test_the_steps_of_its_blocks_are_the_model(model, digits):
    x = images(digits)
    blocks = model.family.blocks(model.module)
    assert blocks[1].bridge is not None
    with torch.no_grad():
        stream = model.module.stem(x).permute(0, 2, 3, 1)
        for step in (step for block in blocks for step in block.steps):
            stream = step(model.module, stream)
        assert close(model.module(x), model.family.head(model.module, stream))


def test_products_are_counted_in_each_window(model):
    shape = trace(model.module, model.family, model.preprocess.input_size)
    first, second = shape.attentions["layers.0.attn"], shape.attentions["layers.1.attn"]
    assert first.macs == 4 * 2 * 2 * 4**2 * 16  # windows · (q kᵀ and its product with v) · heads · tokens² · head dim
    assert second.macs == 2 * 4 * 4**2 * 16
    assert shape.linears["merge.reduction"].macs == 4 * 128 * 64


def test_what_the_output_cares_about_is_known_of_both_stages(model, digits):
    cares = sensitivities(model.module, model.family, digits.split("calibration"), 0, CATEGORICAL)
    assert {name: (len(care.root), len(care.tokens)) for name, care in cares.items()} == {
        "layers.0.attn": (32, 16),
        "layers.0.mlp": (32, 16),
        "layers.1.attn": (64, 4),
        "layers.1.mlp": (64, 4),
    }


def test_weights_of_tokens_follow_them_into_their_windows(model):
    care = Sensitivity(torch.eye(32).double(), torch.eye(32).double(), torch.arange(16).double())
    branch = model.family.branches(model.module)[0]
    weights = care.weights(model.module, branch, torch.zeros(3, 4, 4, 32))
    assert weights.shape == (12, 4)
    assert weights[0].tolist() == [0, 1, 4, 5]
    assert weights[5].tolist() == [2, 3, 6, 7]
    assert FLOOR > 0


@pytest.mark.parametrize("way", [name for name in WAYS if name != "learned gates"])
def test_leaving_everything_reproduces_it(model, digits, way):
    reproduced(model, WAYS[way], digits)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_compressed_sliced_split_and_rebuilt(model, digits, way, tmp_path):
    """Masked, sliced and split are one function; the cost is the predicted one; plan and weights rebuild it to the bit."""
    problem = problem_of(model, WAYS[way], BudgetSection(params=0.75))
    masked = run_stage(Compress(digits), problem).artifact
    sliced = run_stage(Slice(), masked).artifact
    deploy = run_stage(Split(), sliced).artifact
    x = images(digits)
    with torch.no_grad():
        dense, m, s, d = (each.module(x) for each in (model, masked, sliced, deploy))
        assert close(m, s)
        assert close(s, d)
        assert not close(dense, m), "nothing was removed: vacuous"
        again = load_model(save_model(masked, tmp_path / "masked"))
        assert torch.equal(again.module(x), m)
        assert torch.equal(load_model(save_model(deploy, tmp_path / "deploy")).module(x), d)
    predicted = problem.costs.shape(Widths.of(masked.plan))
    counted = trace(deploy.module, deploy.family, deploy.preprocess.input_size)
    left = sum(parameter.numel() for parameter in deploy.module.parameters())
    assert left == predicted.params == counted.params <= 0.75 * problem.shape.params
    assert predicted.macs == counted.macs < problem.shape.macs


def test_a_random_plan_is_one_function_too(model, digits):
    plan = random_plan(model)
    module = copy.deepcopy(model.module)
    factorise(module, {low.module: low.rank for low in plan.low_ranks}, toy_plugin.CUT.factorise)
    masked = mask_model(model, module, plan)
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    with torch.no_grad():
        assert close(masked.module(images(digits)), deploy.module(images(digits)))


@pytest.mark.parametrize("labels", [True, False])
def test_it_recovers_with_and_without_labels(model, digits, labels):
    masked = run_stage(Compress(digits), problem_of(model, WAYS["ours"], BudgetSection(params=0.75))).artifact
    section = FinetuneSection(epochs=1, batch_size=32, labels=labels)
    facts = run_stage(Finetune(section, digits, model), masked).facts
    assert facts.loss == ("distillation" if labels else "imitation")


def test_without_registration_nothing_of_it_is_known(model):
    for registry, entry in OURS:
        registry.discard(entry.name)
    with pytest.raises(ModelError, match=r"ToyNet belongs to no known family \(known: vit, eva, "):
        family_of(model.module, "toy_two_stages")
    for section, names in ((WAYS["ours"], "svd"), (WAYS["ours, over all layers"], "magnitude")):
        with pytest.raises(RecipeError, match=f"is not in this version; it has .*{names}"):
            problem_of(model, section)


RECIPE = """
[data]
source = "digits"
[model]
name = "toy_two_stages"
kwargs = { num_classes = 10 }
pretrained = false

[train]
epochs = 1

[compress]
attention = "cut"
neurons = "first"
allocation = "global"
align = 1

[budget]
params = 0.75

[export]
precisions = ["fp32", "fp16-ours"]
simplify = false
"""


@pytest.mark.slow
def test_an_installed_package_needs_no_more_than_entry_points(tmp_path):
    """The whole pipeline, in a process that finds the package as pip would have installed it."""
    about = tmp_path / "site" / "toy-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[slimvit.families]\ntoy = toy_plugin:FAMILY\n"
        "[slimvit.criteria]\nfirst = toy_plugin:FIRST\n"
        "[slimvit.factorisations]\ncut = toy_plugin:CUT\n"
        "[slimvit.precisions]\nfp16-ours = toy_plugin:HALF\n"
    )
    (tmp_path / "recipe.toml").write_text(RECIPE)
    paths = [str(about.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SLIMVIT_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "toolchain", "run", tmp_path / "recipe.toml", "--out", tmp_path / "run"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    verdicts = {(rung["to"], rung["verdict"]) for rung in report["parity"]}
    assert {verdict for _, verdict in verdicts} == {"pass"}, verdicts
    assert ("compressed.fp16-ours.onnx", "pass") in verdicts
    assert report["ratio"]["params"] <= 0.75
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert {low["module"] for low in plan["low_ranks"]} == {
        f"layers.{index}.attn.{name}" for index in (0, 1) for name in ("qkv", "proj")
    }
    assert plan["keeps"]
    for keep in plan["keeps"]:
        assert keep["indices"] == [list(range(len(keep["indices"][0])))], "the first neurons score highest"
