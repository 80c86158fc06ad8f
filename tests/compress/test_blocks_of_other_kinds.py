"""The default method on blocks that are no plain pre-norm ones: it knows what each does to the stream."""

from __future__ import annotations

import pytest
import torch
from builders import problem_of, random_plan, variant

from toolchain.compress.stage import Compress
from toolchain.data import DataSource, open_source
from toolchain.data.transforms import Wanted
from toolchain.model import TimmModel, run_stage
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.surgery.mask import mask_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

SHARE = 0.6


def error(model: TimmModel, module: torch.nn.Module, source: DataSource) -> float:
    """Of outputs on images that nothing was fitted to, relative to how much they vary over images."""
    images = source.split("test")
    x = torch.stack([images[index][0] for index in range(32)])
    with torch.no_grad():
        wanted = model.module(x)
        return float((module(x) - wanted).norm() / (wanted - wanted.mean(0)).norm())


@pytest.mark.parametrize(
    ("case", "units"),
    [
        ("post-norm", {"blocks.1.attn.head_dim", "blocks.1.mlp.mlp_hidden"}),
        ("parallel", {"blocks.1.attns.1.attn.head_dim", "blocks.1.ffns.0.mlp.mlp_hidden"}),
        ("parallel scaling", {"blocks.1.head_dim", "blocks.1.mlp_hidden"}),
        ("attention pool", {"attn_pool.head_dim", "attn_pool.mlp.mlp_hidden"}),
        ("BEiT shared", {"blocks.1.attn.head_dim", "blocks.1.mlp.mlp_hidden"}),
    ],
)
def test_the_closed_form_errs_less_than_chance_within_the_budget(case, units):
    model = variant(case)
    source = open_source("digits", Wanted(model.preprocess.input_size, {}, calibration_images=48))
    section = CompressSection(allocation="uniform")
    masked = run_stage(Compress(source), problem_of(model, section, BudgetSection(params=SHARE))).artifact
    assert units <= {f"{keep.module}.{keep.unit}" for keep in masked.plan.keeps}
    shipped = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact.module
    left = sum(p.numel() for p in shipped.parameters()) / sum(p.numel() for p in model.module.parameters())
    assert left <= SHARE
    plan = random_plan(model, low_rank=False, share=SHARE)
    sliceable = {(group.module, group.unit) for group in model.groups if group.sliceable}
    keeps = tuple(keep for keep in plan.keeps if (keep.module, keep.unit) in sliceable)
    chance = mask_model(model, variant(case).module, plan.model_copy(update={"keeps": keeps})).module
    assert error(model, shipped, source) < 0.5 * error(model, chance, source)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["parallel", "attention pool"])
def test_the_solver_weighs_every_unit(case):
    model = variant(case)
    source = open_source("digits", Wanted(model.preprocess.input_size, {}, calibration_images=24))
    problem = problem_of(model, CompressSection(), BudgetSection(params=0.8))
    allocation, teacher = Compress(source).decide(problem)
    assert teacher is not None
    assert set(teacher.cares) == {branch.module for branch in model.family.branches(model.module)}
    latents = teacher.cares.get("attn_pool")
    assert latents is None or latents.tokens.shape == (1,)
    assert problem.costs.of(allocation.widths)["params"] <= 0.8 * problem.costs.whole["params"]
