"""One round at full depth per model that the product promises: mask == slice == split == the ONNX file on disk."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import dense_model, problem_of, random_plan

from toolchain.artifacts import open_artifact
from toolchain.compress.factorisations import factorise, truncated_svd
from toolchain.compress.stage import Compress
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.export.calls import stack_images, torch_call
from toolchain.export.stage import Export
from toolchain.model import run_stage
from toolchain.parity import TOLERANCES, compare
from toolchain.recipe import BudgetSection, CompressSection, ExportSection
from toolchain.surgery.mask import mask_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

MODELS = {
    "deit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_medium_patch16_gap_256": 64,
}
"""Name → sides of images: four patches say what fourteen do."""


@pytest.mark.slow  # every structure at two or three blocks goes the same way in test_structures.py
@pytest.mark.parametrize("name", MODELS)
def test_one_function_from_mask_to_onnx(name, tmp_path):
    model = dense_model(name, num_classes=50, img_size=MODELS[name])
    assert len(model.module.blocks) == 12
    plan = random_plan(model)
    module = copy.deepcopy(model.module)
    factorise(module, {low.module: low.rank for low in plan.low_ranks}, truncated_svd)
    masked = mask_model(model, module, plan)
    sliced = run_stage(Slice(), masked).artifact
    deploy = run_stage(Split(), sliced).artifact
    generator = torch.Generator().manual_seed(1)
    images = stack_images([torch.randn(model.preprocess.input_size, generator=generator) for _ in range(3)])
    fp32 = {"tolerance": TOLERANCES["fp32"], "real_images": False}
    rungs = [
        compare("masked", "sliced", torch_call(masked.module), torch_call(sliced.module), images, **fp32),
        compare("sliced", "split", torch_call(sliced.module), torch_call(deploy.module), images, **fp32),
    ]
    exported = run_stage(
        Export(ExportSection(), tmp_path / "model.onnx", images, real_images=False, tool="test"), deploy
    )
    for rung in (*rungs, *exported.rungs):
        assert rung.verdict == "pass", str(rung)
    assert exported.rungs[0].tolerance.max_abs == 1e-5
    assert exported.facts.simplified, exported.facts.notes
    before, after = torch_call(model.module)(images), torch_call(deploy.module)(images)
    assert abs(before - after).max() >= 1e-2 * before.std(), "the plan changes nothing: vacuous"


@pytest.mark.slow
def test_a_size_budget_is_that_of_the_file(tmp_path):
    model = dense_model("deit_tiny_patch16_224", num_classes=50, img_size=64, depth=4)
    section = CompressSection(method="hybrid", attention="svd", neurons="magnitude", allocation="uniform")
    size = model.preprocess.input_size
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    source = open_source("none", Wanted(size, half, calibration_images=8))
    problem = problem_of(model, section, BudgetSection(size="4 MB"))
    masked = run_stage(Compress(source), problem).artifact
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    images = stack_images([source.split("test")[index][0] for index in range(3)])
    path = tmp_path / "model.onnx"
    run_stage(Export(ExportSection(), path, images, real_images=False, tool="test"), deploy)
    assert 0.98 * 4e6 <= open_artifact(path).size_bytes <= 1.02 * 4e6
