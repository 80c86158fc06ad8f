"""How far a re-fit may move: dampings against re-fits done by hand, and folds that keep scenes whole."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import problem_of

from toolchain.compress.choices import key_of
from toolchain.compress.moments import Moments, joined
from toolchain.compress.obs import anchored_refit
from toolchain.compress.ridge import DAMPINGS, FOLDS, UNTRIED, Ridge, folds_of, least_damping
from toolchain.compress.sensitivity import Teacher, flat
from toolchain.compress.sequential import Pass, reduce_sequentially
from toolchain.data import Images
from toolchain.likelihood import CATEGORICAL

WEIGHT, BIAS = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [n, 5] with a mean, errors [n, 2] of which half follows from x)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64) + 3
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return x, x @ torch.ones(5, 2, dtype=torch.float64) * 0.3 + noise + 1


def moments(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None, *, centred: bool = True) -> Moments:
    found = Moments(centred=centred)
    found.add(x, y, weights)
    return found


@pytest.mark.parametrize("centred", [True, False])
def test_joined_moments_are_those_of_all_rows(centred):
    x, y = rows(60)
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = moments(x, y, weights, centred=centred)
    cut = [slice(0, 7), slice(7, 40), slice(40, 60)]
    parts = joined([moments(x[part], y[part], weights[part], centred=centred) for part in cut])
    assert parts.weight == pytest.approx(whole.weight)
    for name in ("mean", "covariance", "other_mean", "cross"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), atol=1e-12), name


@pytest.mark.parametrize("centred", [True, False])
def test_the_damping_is_that_of_least_error_on_rows_that_were_held_out(centred):
    x, y = rows(24)
    folds = torch.arange(24) % 3
    parts = [moments(x[folds == k], y[folds == k], centred=centred) for k in range(3)]
    by_hand = []
    for damping in DAMPINGS:
        wrong = 0.0
        for k in range(3):
            rest = joined([parts[other] for other in range(3) if other != k])
            weight, bias = anchored_refit(WEIGHT, BIAS if centred else None, rest, damping)
            wrong += float((y[folds == k] - x[folds == k] @ weight.T - (bias if centred else 0)).square().sum())
        by_hand.append(wrong)
    assert least_damping([joined([part]) for part in parts]) == DAMPINGS[by_hand.index(min(by_hand))]


def test_noise_is_not_fitted_and_what_follows_is():
    x, _ = rows(40)
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dampings = []
    for error in (noise, x @ torch.randn(5, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)):
        ridge = Ridge()
        ridge.add(x[:, None], error[:, None], torch.arange(40) % FOLDS)
        weight, _, damping = ridge.fitted(WEIGHT, BIAS)
        dampings.append(damping)
        assert weight.abs().max() > 0
    assert dampings[0] >= 1
    assert dampings[1] == DAMPINGS[0]


def test_a_scene_lies_in_one_fold_and_folds_are_about_as_large():
    scenes = torch.tensor([7, 7, 7, 0, 1, 2, 3, 3, 4, 5, 6, 6])
    images = Images(lambda _: torch.zeros(1), torch.zeros(12), scenes=scenes)
    folds = folds_of(images)
    for scene in torch.unique(scenes):
        assert len(torch.unique(folds[scenes == scene])) == 1
    assert folds.bincount(minlength=FOLDS).tolist() == [3, 3, 3, 3]
    assert folds_of(images.take(torch.arange(3))).tolist() == [0, 0, 0]


def test_of_one_scene_nothing_is_held_back_so_the_usual_damping_is_taken():
    x, y = rows(10)
    ridge = Ridge()
    ridge.add(x[:, None], y[:, None], torch.zeros(10, dtype=torch.int64))
    weight, bias, damping = ridge.fitted(WEIGHT, BIAS)
    assert damping == UNTRIED
    expected = anchored_refit(WEIGHT, BIAS, moments(x, y), UNTRIED)
    assert torch.allclose(weight, expected[0])
    assert torch.allclose(bias, expected[1])


def test_weights_count_rows_and_zero_leaves_them_out():
    x, y = rows(16)
    kept, all_rows = Ridge(), Ridge()
    kept.add(x[:8, None], y[:8, None], torch.arange(8) % FOLDS)
    weights = torch.cat([torch.ones(8), torch.zeros(8)]).double()
    all_rows.add(x[:, None], y[:, None], torch.arange(16) % FOLDS, weights[:, None])
    for one, other in zip(kept.fitted(WEIGHT, BIAS), all_rows.fitted(WEIGHT, BIAS), strict=True):
        assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other))


def test_moments_that_are_not_finite_end_in_the_usual_damping():
    x, y = rows(12)
    x[3] = torch.inf
    parts = [joined([moments(x[k::2], y[k::2])]) for k in range(2)]
    assert least_damping(parts) == UNTRIED


def test_a_damping_that_is_given_is_taken():
    x, y = rows(40)
    ridge = Ridge()
    ridge.add(x[:, None], y[:, None], torch.arange(40) % FOLDS)
    weight, bias, damping = ridge.fitted(WEIGHT, BIAS, 0.07)
    assert damping == 0.07
    for found, expected in zip((weight, bias), anchored_refit(WEIGHT, BIAS, moments(x, y), 0.07), strict=True):
        assert torch.allclose(found, expected)


def test_dampings_that_were_chosen_give_the_same_model_when_they_are_given(tiny):
    pictures = torch.randn(24, *tiny.preprocess.input_size, generator=torch.Generator().manual_seed(0))
    images, sites = Images(pictures.__getitem__, torch.zeros(24)), problem_of(tiny).sites
    widths = {key_of(site): max(1, site.total // 2) for site in sites}
    cares = flat(tiny.module, tiny.family, {branch.reader: 5 for branch in tiny.family.branches(tiny.module)})
    taught = Teacher(tiny.module, tiny.family, CATEGORICAL, cares)

    def reduced(dampings):
        module = copy.deepcopy(tiny.module)
        found = reduce_sequentially(taught, module, sites, widths, images, Pass(0.5, dampings=dampings))
        return found, module.state_dict()

    chosen, weights = reduced({})
    again, same = reduced(chosen.dampings)
    assert again.dampings == chosen.dampings
    assert all(value.equal(same[name]) for name, value in weights.items())
    assert again.head.weight.equal(chosen.head.weight)
    name, classifier = "blocks.0.mlp.fc2", tiny.family.classifier(tiny.module)
    other, moved = reduced({name: 0.5, classifier: 7.0})
    assert (other.dampings[name], other.dampings[classifier]) == (0.5, 7.0)
    assert moved["blocks.0.attn.proj.weight"].equal(weights["blocks.0.attn.proj.weight"])
    assert not moved[f"{name}.weight"].equal(weights[f"{name}.weight"])
    assert not other.head.weight.equal(chosen.head.weight)


def test_scenes_reach_the_damping(tiny):
    """Eight copies of a picture in as many folds let a fit look known; as one scene they do not."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(6, *tiny.preprocess.input_size, generator=generator)
    near = pictures.repeat_interleave(8, 0) + 1e-3 * torch.randn(48, *pictures.shape[1:], generator=generator)
    found = {}
    for scenes in (None, torch.arange(48) // 8):
        images, module = Images(near.__getitem__, torch.zeros(48), scenes=scenes), copy.deepcopy(tiny.module)
        widths = {key_of(site): max(1, site.total // 2) for site in problem_of(tiny).sites}
        cares = flat(module, tiny.family, {branch.reader: 5 for branch in tiny.family.branches(module)})
        taught = Teacher(tiny.module, tiny.family, CATEGORICAL, cares)
        reduced = reduce_sequentially(taught, module, problem_of(tiny).sites, widths, images, Pass(0.5))
        found[scenes is None] = reduced.dampings
    assert found[True].keys() == found[False].keys()
    assert all(found[True][name] <= found[False][name] for name in found[True])
    assert any(found[True][name] < found[False][name] for name in found[True])
