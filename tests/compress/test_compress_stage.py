"""Compress from end to end, on real digits and without any: what it promises about its plan."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import STRUCTURES, dense_model, problem_of, random_plan, variant
from PIL import Image

from toolchain.compress.criteria import CRITERIA, Evidence, Lessons
from toolchain.compress.factorisations import factorise, truncated_svd
from toolchain.compress.gates import learn_gates
from toolchain.compress.problem import Problem
from toolchain.compress.solver import top_indices
from toolchain.compress.stage import Compress, pruned_shares
from toolchain.data import DataSource, Images, open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import BudgetError, DataError, ModelError, RecipeError
from toolchain.likelihood import CATEGORICAL
from toolchain.model import MaskedModel, TimmModel, run_stage
from toolchain.recipe import BudgetSection, CompressSection, VtpSection
from toolchain.surgery.mask import baked, mask_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.evaluate import accuracy
from toolchain.training.stages import light_augmentation

DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
BUDGET = BudgetSection(params=0.7)
FAST = VtpSection(epochs=1, gate_lr=0.05, l1=1e-3, batch_size=32)
METHODS = {
    "hybrid": CompressSection(method="hybrid", vtp=FAST),
    "vtp": CompressSection(method="vtp", vtp=FAST),
    "taylor": CompressSection(method="hybrid", neurons="taylor", allocation="uniform"),
}


def source(name: str) -> DataSource:
    config = {"mean": (0.5,), "std": (0.5,)}
    return open_source(name, Wanted((1, 8, 8), config, calibration_images=64))


@pytest.fixture(scope="module")
def digits() -> DataSource:
    """Few to train on, all to be judged by."""
    opened = source("digits")
    return replace(opened, splits={**opened.splits, "train": opened.split("train").take(torch.arange(128))})


@pytest.fixture(scope="module")
def synthetic() -> DataSource:
    return source("none")


def model(**kwargs: object) -> TimmModel:
    return dense_model("vit_tiny_patch16_224", **{**DIGITS, **kwargs})


def compress(
    given: TimmModel, section: CompressSection, images: DataSource, budget: BudgetSection = BUDGET, **multiples
):
    problem = Problem.of(given, section, budget, multiples, synthetic=images.synthetic)
    return run_stage(Compress(images), problem).artifact


@pytest.mark.parametrize("method", METHODS)
def test_the_same_twice_is_the_same_to_the_byte(digits, method):
    """Also under another global random state, which must be neither read nor moved."""
    made: list[MaskedModel] = []
    for seed in (1, 2):
        given = model()
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        made.append(compress(given, METHODS[method], digits))
        assert torch.equal(torch.random.get_rng_state(), before)
    one, two = made
    assert one.plan.to_json().encode() == two.plan.to_json().encode()
    first, second = (baked(part.module).state_dict() for part in made)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["hybrid", "vtp"])
def test_another_seed_is_another_plan(digits, method):
    plans = [compress(model(), METHODS[method].model_copy(update={"seed": seed}), digits).plan for seed in (0, 1)]
    assert plans[0].keeps != plans[1].keeps


@pytest.mark.parametrize("method", METHODS)
def test_the_given_model_is_left_alone(digits, method):
    given = model()
    before = {name: tensor.clone() for name, tensor in given.module.state_dict().items()}
    names = [name for name, _ in given.module.named_modules()]
    compress(given, METHODS[method], digits)
    assert [name for name, _ in given.module.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.module.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_by_what_is_physically_left(digits, method):
    given = model()
    deploy = run_stage(Split(), run_stage(Slice(), compress(given, METHODS[method], digits)).artifact).artifact
    left = sum(p.numel() for p in deploy.module.parameters()) / sum(p.numel() for p in given.module.parameters())
    assert 0.68 <= left <= 0.7
    assert 0.05 < accuracy(deploy.module, digits.split("test")).accuracy <= 1.0


def test_hybrid_factorises_attention_and_prunes_neurons_only(digits):
    plan = compress(model(), METHODS["hybrid"], digits).plan
    assert {low.module for low in plan.low_ranks} == {f"blocks.{b}.attn.{n}" for b in (0, 1) for n in ("qkv", "proj")}
    assert {keep.unit for keep in plan.keeps} == {"mlp_hidden"}


def test_vtp_gates_every_kind_and_slices_neurons(digits):
    section = METHODS["vtp"].model_copy(update={"vtp": FAST.model_copy(update={"gate_lr": 0.3, "l1": 0.05})})
    made = compress(model(), section, digits)
    assert made.plan.low_ranks == ()
    rows = pruned_shares(made)
    kinds = {row.kind: row.physical for row in rows}
    assert kinds == {"attn_in": False, "attn_out": False, "mlp_in": False, "mlp_hidden": True}
    assert all(0 < row.removed <= 0.9 * row.total for row in rows)


@pytest.mark.parametrize("method", ["hybrid", "vtp"])
def test_gates_are_folded_into_the_weights_that_they_were_trained_with(digits, method):
    given, section = model(), METHODS[method]
    made = compress(given, section, digits)
    module = copy.deepcopy(given.module)
    factorise(module, {low.module: low.rank for low in made.plan.low_ranks}, truncated_svd)
    units = {"mlp_hidden"} if method == "hybrid" else {"attn_in", "attn_out", "mlp_in", "mlp_hidden"}
    groups = [group for group in given.groups if group.unit in units]
    lessons = Lessons(digits.split("train"), CATEGORICAL, **light_augmentation(digits, given))
    learn_gates(Evidence(module, groups, digits.split("calibration"), section, lessons))
    expected = baked(mask_model(given, baked(module), made.plan).module).state_dict()
    found = baked(made.module).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    dense = given.module.blocks[0].mlp.fc2.weight
    assert not torch.isclose(found["blocks.0.mlp.fc2.weight"], dense, rtol=1e-3).all(0).any(), "not trained: vacuous"


def test_what_is_kept_scores_highest(digits):
    given = model()
    section = CompressSection(method="vtp", neurons="magnitude", allocation="uniform")
    made = compress(given, section, digits)
    hidden = [group for group in given.groups if group.unit == "mlp_hidden"]
    scores = CRITERIA["magnitude"].score(Evidence(given.module, hidden, digits.split("calibration"), section))
    for keep in made.plan.keeps:
        assert keep.indices == (top_indices(scores[keep.module, keep.unit], keep.kept),)
    assert len(made.plan.keeps) == 2


def test_scores_are_taken_after_attention_was_factorised(digits):
    """The neurons are judged in the model that they will live in."""
    given = model()
    section = CompressSection(method="hybrid", neurons="variance", allocation="uniform", attention_share=0.2)
    made = compress(given, section, digits, BudgetSection(params=0.6))
    hidden = [group for group in given.groups if group.unit == "mlp_hidden"]
    on_dense = CRITERIA["variance"].score(Evidence(given.module, hidden, digits.split("calibration"), section))
    different = [
        keep.indices != (top_indices(on_dense[keep.module, keep.unit], keep.kept),) for keep in made.plan.keeps
    ]
    assert any(different)


def test_provenance_says_how_the_plan_was_found(digits):
    given = replace(model(), provenance={"weights": "checkpoint", "checkpoint_sha256": "0" * 64})
    made = compress(given, METHODS["taylor"], digits, mlp_hidden=8, rank=4)
    found = json.loads(made.plan.to_json())["provenance"]
    assert found["requested"] == "hybrid"
    assert found["method"]["neurons"] == "taylor"
    assert found["budget"]["params"] == 0.7
    assert found["multiples"] == {"mlp_hidden": 8, "rank": 4}
    assert found["data"] == {"source": "digits", "digest": digits.digest}
    assert found["synthetic"] is False
    assert found["weights"] == {"weights": "checkpoint", "checkpoint_sha256": "0" * 64}
    assert {keep.kept % 8 for keep in made.plan.keeps} == {0}
    assert {low.rank % 4 for low in made.plan.low_ranks} == {0}


def test_the_same_images_in_two_folders_give_the_same_plan(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    plans = []
    for place in (tmp_path / "a", tmp_path / "b" / "c"):
        place.mkdir(parents=True)
        for number, picture in enumerate(pixels):
            Image.fromarray(picture).save(place / f"{number}.png")
        plans.append(compress(model(), METHODS["taylor"], source(f"images:{place}")).plan)
    assert plans[0].digest == plans[1].digest
    assert str(tmp_path) not in plans[0].to_json()


@pytest.mark.parametrize("section", [CompressSection(method="hybrid"), CompressSection(method="vtp")])
def test_a_synthetic_source_means_magnitude_and_uniform_and_says_so(synthetic, section):
    made = compress(model(), section, synthetic)
    found = made.plan.provenance
    assert (found["method"]["neurons"], found["method"]["allocation"]) == ("magnitude", "uniform")
    assert found["requested"] == section.method
    assert found["synthetic"] is True
    kept = [keep.kept for keep in made.plan.keeps]
    assert max(kept) - min(kept) <= 1
    assert made.plan.keeps


def test_method_none_changes_nothing(digits):
    given = model()
    made = compress(given, CompressSection(method="none"), digits, BudgetSection())
    assert (made.plan.keeps, made.plan.low_ranks) == ((), ())
    assert pruned_shares(made) == []
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    deploy = run_stage(Split(), run_stage(Slice(), made).artifact).artifact
    with torch.no_grad():
        assert torch.equal(made.module(x), given.module(x))
        assert torch.equal(deploy.module(x), given.module(x))


def test_attention_alone(digits):
    section = CompressSection(method="hybrid", neurons="none")
    made = compress(model(), section, digits, BudgetSection(params=0.85))
    assert made.plan.keeps == ()
    assert len(made.plan.low_ranks) == 4


@pytest.mark.parametrize("neurons", ["vtp", "magnitude"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_model_without_prunable_neurons_is_compressed_by_its_attention(digits, neurons, allocation):
    """A norm over the hidden layer: the family declares no neurons, and hybrid still has the attention."""
    section = CompressSection(method="hybrid", neurons=neurons, allocation=allocation, vtp=FAST)
    made = compress(model(scale_mlp_norm=True), section, digits, BudgetSection(params=0.85))
    assert made.plan.keeps == ()
    assert len(made.plan.low_ranks) == 4
    with pytest.raises(RecipeError, match=r"nothing of .* a norm over the hidden layer"):
        compress(model(scale_mlp_norm=True), METHODS["vtp"], digits)


# Refusals, all before any work


def test_vtp_needs_labels_and_the_right_classes(digits, tmp_path):
    with pytest.raises(ModelError, match=r"has 7 classes.*num_classes = 10"):
        compress(model(num_classes=7), METHODS["vtp"], digits)
    unlabelled = replace(digits, num_classes=None)
    with pytest.raises(DataError, match=r"compress\.neurons = 'vtp' needs labels"):
        compress(model(), METHODS["vtp"], unlabelled)
    compress(model(), METHODS["taylor"], unlabelled)


def test_an_impossible_budget_is_refused_before_training():
    with pytest.raises(BudgetError, match="reachable is"):
        problem_of(model(), METHODS["vtp"], BudgetSection(params=0.01))


def test_a_plan_that_misses_the_budget_is_caught(digits):
    given = model()
    stage, problem = Compress(digits), problem_of(given, METHODS["taylor"], BUDGET)
    whole = compress(given, CompressSection(method="none"), digits, BudgetSection())
    with pytest.raises(BudgetError, match=r"misses the budget: [0-9,]+ parameters"):
        stage.ensures(problem, whole)
    stage.ensures(problem, stage(problem).artifact)


def test_pruned_shares_add_up(digits):
    made = compress(model(), METHODS["taylor"], digits)
    rows = pruned_shares(made)
    assert {(row.block, row.kind) for row in rows} == {
        (f"blocks.{block}", kind) for block in (0, 1) for kind in ("mlp_hidden", "rank.qkv", "rank.proj")
    }
    for row in rows:
        if row.kind == "mlp_hidden":
            keep = made.plan.keep(f"{row.block}.mlp", "mlp_hidden")
            assert keep is not None
            assert (row.total, row.removed) == (192, 192 - keep.kept)
        else:
            assert (row.total, row.physical) == (48, True)
            rank = next(low.rank for low in made.plan.low_ranks if low.module == f"{row.block}.attn.{row.kind[5:]}")
            assert row.removed == 48 - rank


def test_the_default_method_does_not_look_at_labels(digits):
    """The same plan and the same weights, to the bit, from labels that are all wrong."""
    splits = {
        name: Images(
            images._load, (images._all_labels + 1 + torch.arange(len(images._all_labels))) % 10, images.positions
        )
        for name, images in digits.splits.items()
    }
    changed = replace(digits, splits=splits)
    assert [changed.split("train")[i][1] for i in range(8)] != [digits.split("train")[i][1] for i in range(8)]
    ours, theirs = (compress(model(), CompressSection(), images) for images in (digits, changed))
    assert ours.plan.to_json() == theirs.plan.to_json()
    for one, two in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert theirs.plan.provenance["method"]["allocation"] == "solver"


@pytest.mark.parametrize("case", STRUCTURES)
def test_what_is_pruned_is_told_block_by_block_for_every_structure(case):
    model = variant(case)
    plan = random_plan(model)
    rows = pruned_shares(mask_model(model, factorised(model, plan), plan))
    assert len(rows) == len(plan.keeps) + len(plan.low_ranks)
    assert {row.block for row in rows} == {block.path for block in model.family.blocks(model.module)}
    assert all(0 < row.removed < row.total for row in rows)


def factorised(model, plan):
    module = copy.deepcopy(model.module)
    factorise(module, {low.module: low.rank for low in plan.low_ranks}, truncated_svd)
    return module
