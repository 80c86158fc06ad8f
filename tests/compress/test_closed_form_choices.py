"""What the closed form decides for itself: how hard to look, on which images, at which β, with which classifier."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import dense_model, problem_of, variant
from test_closed_form import Noise, outputs, sites, teacher, widths

from toolchain.compress import closed_form
from toolchain.compress.choices import Choices
from toolchain.compress.closed_form import (
    IMAGES,
    MEASURE_MACS,
    SHARES,
    Work,
    betas_for,
    effort,
    reduce_closed_form,
)
from toolchain.compress.damage import WORST, Effort, follow, measure
from toolchain.compress.moments import WIDE, Moments
from toolchain.compress.sensitivity import FLOOR, Teacher, flat
from toolchain.compress.sequential import Pass, reduce_sequentially
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.likelihood import CATEGORICAL, divergence_by_image, outputs_of
from toolchain.progress import Nobody, Progress
from toolchain.recipe import CompressSection

TOKENS = {f"blocks.{block}.mlp.fc2": 5 for block in range(2)}
DIGITS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", Wanted((1, 8, 8), {}, calibration_images=96))


@pytest.fixture(scope="module")
def model():
    return dense_model("vit_tiny_patch16_224", **DIGITS)


def test_effort_falls_with_the_size_of_the_model():
    found = [effort(macs, 24) for macs in (10**6, 10**8, 10**9, 4 * 10**9, 2 * 10**10, 10**12)]
    work = [min(how.images, IMAGES[1]) * (12 * how.anchors + len(how.shares) + 2) for how in found]
    assert work[:-1] == sorted(work[:-1], reverse=True)
    assert found[0].shares is SHARES[0]
    assert found[0].anchors == len(SHARES[0])
    assert found[-1] == Effort(SHARES[1], 1, IMAGES[0])
    for macs, each in zip((10**6, 10**8, 10**9), work, strict=False):
        assert each * macs <= 1.12 * MEASURE_MACS


def test_beta_is_one_where_it_is_dear_or_idle(model):
    def betas(images=512, dense=model, **section):
        return betas_for(problem_of(dense, CompressSection(**section)), images)

    assert betas() == (0.5, 0.0, 1.0)
    assert betas(10**10) == (1.0,)
    assert betas(sequential=False) == betas(refit=False) == (0.0,)
    assert betas(dense=variant("Swin V2")) == betas(dense=variant("post-norm")) == (0.0,), "it would change nothing"


def test_progress_counts_damage_only_where_it_is_measured(model):
    work = Work.of(problem_of(model), 512)
    assert min(work.teacher, work.damage, work.passes) > 0
    assert Work.of(problem_of(model, CompressSection(allocation="uniform")), 512).damage == 0
    assert Work.of(problem_of(model, CompressSection(method="none", allocation="solver")), 512).damage == 0
    parts = [work.part(Progress(), name) for name in ("teacher", "damage", "passes")]
    assert [part.start for part in parts] == [0, parts[0].end, parts[1].end]
    assert parts[2].end == 1


class Texts(Nobody):
    def __init__(self):
        self.told = []

    def at(self, share, text):
        self.told.append((share, text))


def test_progress_never_goes_back(model, digits):
    texts, module = Texts(), copy.deepcopy(model.module)
    reduce_closed_form(problem_of(model), teacher(model), module, widths(model, 0.5), digits, Progress(texts))
    shares = [share for share, _ in texts.told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) == 3 * 2 + 1  # β × blocks, and the end


def test_the_best_of_beta_and_classifier_is_kept(model, digits):
    """By divergence on validation; what is written is what won."""
    module = copy.deepcopy(model.module)
    _, facts = reduce_closed_form(problem_of(model), teacher(model), module, widths(model, 0.25), digits)
    assert set(facts.kl) == {f"{beta}{head}" for beta in (0.5, 0.0, 1.0) for head in ("", " head")}
    best = min(facts.kl, key=facts.kl.get)
    assert best == f"{facts.beta}{' head' if facts.head_refitted else ''}"
    validation = closed_form._some(digits.split("validation"), IMAGES[1])
    found = float(
        divergence_by_image(CATEGORICAL, outputs_of(module, validation), outputs_of(model.module, validation)).mean()
    )
    assert found == pytest.approx(facts.kl[best], rel=1e-4)
    assert module.head.weight.equal(model.module.head.weight) == (not facts.head_refitted)


def test_the_classifier_takes_up_what_is_left(model):
    module, data = copy.deepcopy(model.module), Noise(model, 512)
    found = reduce_sequentially(teacher(model), module, sites(model), widths(model, 0.25), data, Pass(0.5))
    fresh = Noise(model, 128, seed=1).images
    wanted = outputs(model.module, fresh)
    before = outputs(module, fresh)
    assert found.head is not None
    found.head.put_into(module)
    errors = [(x - x.mean(1, keepdim=True)).square().mean() for x in (before - wanted, outputs(module, fresh) - wanted)]
    assert 0 < errors[1] < errors[0]


def test_few_anchors_give_the_same_damage_within_reason(model, digits):
    """The path that large models take: divergence at one width, the branch's own error in between."""
    choices = Choices(sites(model), {}, {})
    shares, fit, held_out = (0.25, 0.5, 0.75), digits.split("calibration"), digits.split("validation")
    plain = Teacher(model.module, model.family, CATEGORICAL, flat(model.module, model.family, TOKENS))
    every, one = (
        measure(plain, sites(model), choices, Effort(shares, anchors, 256), fit, held_out) for anchors in (3, 1)
    )
    assert [(c.key, c.kept) for c in every] == [(c.key, c.kept) for c in one]
    ratios = [math.log(b.damage / a.damage) for a, b in zip(every, one, strict=True) if a.damage > 0]
    assert len(ratios) == 3 * len(sites(model))
    assert sum(1 for ratio in ratios if ratio == 0) >= len(sites(model)), "one width of each is measured in both"
    assert any(ratio != 0 for ratio in ratios)
    assert max(map(abs, ratios)) < 1.5


def test_large_models_take_that_path(model, digits):
    how, choices, fit = effort(10**12, len(sites(model))), Choices(sites(model), {}, {}), digits.split("calibration")
    assert how.anchors == 1
    found = measure(teacher(model), sites(model), choices, how, fit, digits.split("validation").take(torch.arange(16)))
    for site in sites(model):
        own = [c.damage for c in found if c.key == (site.module, site.unit)]
        assert own[-1] == 0.0
        assert all(0 < damage < WORST for damage in own[:-1])


def test_a_width_without_finite_output_is_the_worst():
    assert follow([16.0, 8.0, 4.0], {0: WORST, 2: 0.4})[1] == pytest.approx(0.8)
    assert follow([math.inf, 8.0, 4.0], {2: 0.4})[0] == WORST
    # An exact zero says nothing about its neighbours.
    assert follow([16.0, 8.0, 4.0, 1.0], {0: 1.6, 3: 0.0})[1:3] == pytest.approx([0.8, 0.4])


def test_without_a_bias_moments_are_about_zero():
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).double() + 2
    other = rows @ torch.ones(4, 3).double() - 1
    moments = Moments(centred=False)
    moments.add(rows[:100], other[:100])
    moments.add(rows[100:], other[100:])
    assert not moments.mean.any()
    assert not moments.other_mean.any()
    assert torch.allclose(moments.covariance, rows.T @ rows / 200)
    assert torch.allclose(moments.cross, other.T @ rows / 200)


@pytest.mark.parametrize("case", ["no proj bias", "no qkv bias"])
def test_layers_without_a_bias_are_fitted_as_such(case):
    """What enters the linears has a mean here, and nothing can take it up."""
    found = variant(case)
    with torch.no_grad():
        for name, parameter in found.module.named_parameters():
            if "norm" in name and name.endswith("bias"):
                parameter.add_(0.5)
    fresh, errors = Noise(found, 32, seed=1).images, {}
    for refit in (False, True):
        module = copy.deepcopy(found.module)
        how = Pass(0.5, refit=refit)
        reduce_sequentially(teacher(found), module, sites(found), widths(found, 0.4), Noise(found, 256), how)
        errors[refit] = float((outputs(found.module, fresh) - outputs(module, fresh)).square().mean())
    assert 0 < errors[True] < 0.7 * errors[False]


def test_a_branch_that_is_left_whole_mends_what_came_before():
    found = variant("q/k norm")
    neurons = [group for group in found.groups if group.unit == "mlp_hidden"]
    wanted = {key: kept for key, kept in widths(found, 0.3).items() if key[1] == "mlp_hidden"}
    assert {g.unit for g in found.groups if g.sliceable} == {"mlp_hidden"}, "attention is left alone"
    module = copy.deepcopy(found.module)
    reduce_sequentially(teacher(found), module, neurons, wanted, Noise(found, 128), Pass(1.0))
    moved = {
        n for (n, a), b in zip(found.module.named_parameters(), module.parameters(), strict=True) if not a.equal(b)
    }
    assert "blocks.1.attn.proj.weight" in moved
    assert "blocks.0.attn.proj.weight" not in moved, "nothing was reduced before it"


def test_without_refit_what_is_left_stays_as_it_was(model):
    module = copy.deepcopy(model.module)
    neurons = [site for site in sites(model) if site.unit == "mlp_hidden"]
    wanted = {(site.module, site.unit): 50 for site in neurons}
    found = reduce_sequentially(teacher(model), module, neurons, wanted, Noise(model, 64), Pass(0.0, refit=False))
    assert found.head is None
    for site in neurons:
        kept = list(found.kept[site.module, site.unit])
        before, after = (m.get_submodule(f"{site.module}.fc2") for m in (model.module, module))
        assert after.weight[:, kept].equal(before.weight[:, kept])
        assert after.bias.equal(before.bias)
        assert int(after.weight.any(0).sum()) == 50


def test_flat_sensitivity_knows_what_the_head_reads(model):
    found = flat(model.module, model.family, TOKENS)
    assert found["blocks.0.mlp"].tokens.tolist() == [1.0] * 5
    last = found["blocks.1.attn"].tokens
    assert last[1:].tolist() == pytest.approx([FLOOR] * 4)
    assert float(last.mean()) == pytest.approx(1.0)


def test_wide_moments_are_those_of_the_whole_product():
    generator = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(50, WIDE + 37, generator=generator), torch.rand(50, generator=generator)
    whole, blocks = Moments(), Moments()
    whole.add(rows[:, : WIDE // 2], weights=weights)
    blocks.add(rows, weights=weights)
    assert torch.allclose(whole.covariance, blocks.covariance[: WIDE // 2, : WIDE // 2], atol=1e-6)
    assert blocks.covariance.equal(blocks.covariance.T)
