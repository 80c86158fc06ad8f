"""How far outputs are apart: each likelihood against torch's own distributions, and what its gradients say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli as Coin
from torch.distributions import Categorical as Die
from torch.distributions import Normal, kl_divergence

from toolchain.data import Images
from toolchain.errors import DataError
from toolchain.likelihood import (
    SPREAD_FLOOR,
    Bernoulli,
    Categorical,
    Gaussian,
    Several,
    Tokens,
    in_batches,
    likelihood_of,
    outputs_of,
)
from toolchain.outputs import label_classes, output_of

SPREAD = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
CASES = {
    "categorical": (Categorical(), lambda y: Die(logits=y)),
    "bernoulli": (Bernoulli(), lambda y: Coin(logits=y)),
    "gaussian": (Gaussian(SPREAD), lambda y: Normal(y, SPREAD.expand_as(y))),
}
EVERY = pytest.mark.parametrize("case", CASES)


def outputs(seed, count=4, width=3):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, width, generator=generator, dtype=torch.float64)


def kl(distribution, ours, theirs):
    found = kl_divergence(distribution(theirs), distribution(ours))
    return found if found.ndim == 1 else found.sum(1)


@EVERY
def test_the_divergence_is_that_of_torchs_distributions(case):
    likelihood, distribution = CASES[case]
    ours, theirs = outputs(0), outputs(1)
    torch.testing.assert_close(likelihood.divergence(ours, theirs), kl(distribution, ours, theirs))
    assert likelihood.divergence(theirs, theirs).abs().max() < 1e-12
    assert likelihood.divergence(ours, theirs).min() > 1e-3


@EVERY
def test_a_temperature_softens_both_and_keeps_the_size_of_the_gradient(case):
    likelihood, distribution = CASES[case]
    ours, theirs = outputs(0), outputs(1)
    softened = likelihood.divergence(ours, theirs, 3.0)
    expected = 9 * kl(distribution, ours / 3, theirs / 3)
    torch.testing.assert_close(softened, expected)
    if case == "gaussian":
        torch.testing.assert_close(softened, likelihood.divergence(ours, theirs))


@EVERY
def test_scores_give_the_curvature_of_the_divergence(case):
    """E[g gᵀ] is the Hessian of the divergence at the model itself: the Fisher information, whatever the outputs are."""
    likelihood, _ = CASES[case]
    y = outputs(2, count=1)
    draws = 40_000
    many = y.expand(draws, -1).clone().requires_grad_()
    likelihood.score_loss(many, torch.Generator().manual_seed(0)).backward()
    fisher = many.grad.T @ many.grad / draws
    hessian = torch.autograd.functional.hessian(lambda x: likelihood.divergence(x[None], y).sum(), y[0])
    torch.testing.assert_close(fisher, hessian, atol=0.03 * float(hessian.abs().max()), rtol=0)
    assert float(hessian.diagonal().min()) > 1e-4


def test_only_softmax_ignores_what_all_outputs_share():
    error = outputs(3)
    for case, (likelihood, _) in CASES.items():
        same = torch.allclose(likelihood.noticed(error), likelihood.noticed(error + 1))
        assert same == (case == "categorical"), case


def test_a_single_output_is_told_apart_from_another():
    """Kind: outputs without classes. The softmax of one number is 1, so that every divergence of it would be 0."""
    ours, theirs = outputs(0, width=1), outputs(1, width=1)
    assert Categorical().divergence(ours, theirs).abs().max() == 0
    for likelihood in (Bernoulli(), Gaussian.of(theirs)):
        assert likelihood.divergence(ours, theirs).min() > 1e-4


def test_numbers_are_scaled_by_their_own_spread():
    reference = outputs(0, count=400, width=4) * torch.tensor([1.0, 100.0, 1e-9, 0.0]) + torch.tensor(
        [0.0, 0.0, 5.0, 0.0]
    )
    spread = Gaussian.of(reference).spread
    torch.testing.assert_close(spread[:2], reference.std(0)[:2])
    assert spread[2] == pytest.approx(SPREAD_FLOOR * 5.0), "what is all but constant must not outweigh the others"
    assert spread[3] == spread[1], "and what is always 0 must not be divided by 0"
    for images in (reference[:1], reference[:1].expand(5, -1)):
        with pytest.raises(DataError, match=f"the same for all {len(images)} calibration images"):
            Gaussian.of(images)


def test_labels_train_classes_and_single_logits():
    y, labels = outputs(0), torch.tensor([0, 2, 1, 1])
    assert float(Categorical().supervised(y, labels)) == pytest.approx(float(-Die(logits=y).log_prob(labels).mean()))
    single, yes = y[:, :1], torch.tensor([0, 1, 1, 0])
    assert float(Bernoulli().supervised(single, yes)) == pytest.approx(
        float(-Coin(logits=single[:, 0]).log_prob(yes.double()).mean())
    )
    with pytest.raises(TypeError, match="cannot train 3 outputs that are numbers"):
        Gaussian(SPREAD).supervised(y, labels)


def test_what_outputs_are_and_which_labels_judge_them():
    declared = ("logits", "multi-label", "regression", None)
    assert [output_of(each, 1) for each in declared] == ["logits", "multi-label", "regression", "regression"]
    assert [output_of(each, 7) for each in declared] == ["logits", "multi-label", "regression", "logits"]
    assert [label_classes(output_of(each, 7), 7) for each in declared] == [7, None, None, 7]
    assert [label_classes(output_of(each, 1), 1) for each in declared] == [1, 2, None, None]


def test_a_likelihood_looks_at_images_only_where_it_must():
    def model(batch):
        return batch.flatten(1)[:, :2]

    images = Images(lambda position: torch.full((1, 1, 2), float(position)) * torch.tensor([1.0, 3.0]), [-1] * 5)
    assert outputs_of(model, images)[4].tolist() == [4.0, 12.0]
    spread = likelihood_of("regression", model, images).spread
    torch.testing.assert_close(spread, torch.tensor([1.0, 3.0]) * torch.arange(5.0).std())
    nothing = Images(lambda _: pytest.fail("an image was read"), [-1])
    assert likelihood_of("logits", model, nothing) == Categorical()
    assert likelihood_of("multi-label", model, nothing) == Bernoulli()


# Tokens: one diagonal covariance, pooled over positions


def tokens(seed, outliers=0.0, count=32):
    """[images, 9, 6] around a mean, of several spreads; some of them very far away, all in one direction."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    y = 5 + spread * torch.randn(count, 9, 6, generator=generator, dtype=torch.float64)
    far = torch.rand(count, 9, generator=generator) < outliers
    y[far] += 100 * torch.tensor([0.0, 0, 1, 0, 1, 0], dtype=torch.float64)
    return y, far


def fitted(sample, batches):
    """The likelihood of the tokens of one output."""
    (likelihood,) = Tokens.of_several((sample,), ((batch,) for batch in batches))
    return likelihood


def test_of_ordinary_tokens_the_divergence_is_the_mean_of_normal_distributions():
    """In closed form: E‖(Δ/s)‖²/2 over the tokens of an image, with the spread over images and positions."""
    y, _ = tokens(0)
    z = y + 0.1 * tokens(1)[0]
    likelihood = replace(fitted(y, [y]), typical=1e9)  # no token is far
    plain = y.flatten(0, 1)
    assert torch.allclose(fitted(y, [y]).spread, plain.std(0, correction=0), rtol=0.15)
    distribution = (Normal(each, likelihood.spread.expand_as(each)) for each in (y, z))
    torch.testing.assert_close(likelihood.divergence(z, y), kl_divergence(*distribution).sum(-1).mean(-1))


def test_few_tokens_far_away_neither_widen_the_spread_nor_decide_the_divergence_nor_are_lost():
    """Kind: DINOv2 without registers, of whose tokens a few are tens of times as large as the others."""
    (clean, _), (y, far) = tokens(0), tokens(0, outliers=0.03)
    assert 0 < far.sum() < 20
    likelihood = fitted(y, [y])
    torch.testing.assert_close(likelihood.spread, fitted(clean, [clean]).spread, rtol=0.35, atol=0)
    assert y.flatten(0, 1).std(0)[2] > 5 * likelihood.spread[2], "what it would be"
    error = 0.05 * (y - likelihood.mean)  # each token off by the same share of itself
    per_token = likelihood.weights(y) * (error / likelihood.spread).square().sum(-1)
    assert per_token[far].max() < 3 * per_token[~far].mean(), "not dominating"
    assert per_token[far].min() > 0.3 * per_token[~far].mean(), "not lost"


def test_a_spread_in_batches_is_that_of_all_tokens():
    y, _ = tokens(3, outliers=0.03)
    known = fitted(y, [y])
    torch.testing.assert_close(fitted(y, [y[:16], y[16:]]).spread, known.spread, rtol=0.2, atol=0)
    torch.testing.assert_close(fitted(y.reshape(32, 3, 3, 6), [y.reshape(32, 3, 3, 6)]).spread, known.spread)
    with pytest.raises(DataError, match="tokens are the same everywhere"):
        fitted(torch.ones(4, 9, 6), [torch.ones(4, 9, 6)])


@pytest.mark.parametrize("output", ["tokens", "layers"])
def test_the_order_of_images_changes_nothing(output):
    """Splits are in the order of their classes: the first images are of one."""
    y, _ = tokens(4, count=256)
    y[128:] += torch.tensor([0.0, 9, 0, -9, 9, 9])
    mixed = y[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    given = Images(y.__getitem__, [-1] * 256), Images(mixed.__getitem__, [-1] * 256)
    model = (lambda batch: batch) if output == "tokens" else lambda batch: (batch,)
    ordered, shuffled = (likelihood_of(output, model, images) for images in given)
    if output == "layers":
        (ordered,), (shuffled,) = ordered.parts, shuffled.parts
    torch.testing.assert_close(ordered.mean, shuffled.mean, rtol=0, atol=1.5)
    torch.testing.assert_close(ordered.spread, shuffled.spread, rtol=0.2, atol=0)
    assert ordered.typical == pytest.approx(shuffled.typical, rel=0.2)


@pytest.mark.parametrize("outliers", [0.0, 0.03])
def test_the_scores_of_tokens_have_the_curvature_of_their_divergence(outliers):
    """The mean outer product of the gradients is the Hessian of the divergence, which is diagonal."""
    y, _ = tokens(0, outliers, count=2)
    likelihood = fitted(tokens(0, outliers)[0], [tokens(0, outliers)[0]])
    generator, mean = torch.Generator().manual_seed(0), torch.zeros_like(y)
    for _ in range(2000):
        x = y.clone().requires_grad_()
        likelihood.score_loss(x, generator).backward()
        mean += x.grad.square() / 2000
    hessian = likelihood.weights(y)[..., None] / likelihood.spread.square() / y.shape[1]
    torch.testing.assert_close(mean, hessian, rtol=0.25, atol=0)


def test_of_several_outputs_divergence_and_curvature_are_the_means():
    a, b = tokens(0)[0], tokens(1)[0]
    likelihood = Several((fitted(a, [a]), fitted(b, [b])))
    parts = [part.divergence(y + 0.1, y) for part, y in zip(likelihood.parts, (a, b), strict=True)]
    torch.testing.assert_close(likelihood.divergence((a + 0.1, b + 0.1), (a, b)), (parts[0] + parts[1]) / 2)
    x = a[:2].clone().requires_grad_()
    generator, mean = torch.Generator().manual_seed(0), torch.zeros_like(x)
    for _ in range(2000):
        x.grad = None
        likelihood.score_loss((x, b), generator).backward()
        mean += x.grad.square() / 2000
    hessian = likelihood.parts[0].weights(a[:2])[..., None] / likelihood.parts[0].spread.square() / 9 / 2
    torch.testing.assert_close(mean, hessian, rtol=0.25, atol=0)
    for each in (likelihood, likelihood.parts[0]):
        with pytest.raises(TypeError, match="class labels cannot train"):
            each.supervised(a, torch.zeros(3))


def test_whoever_reads_outputs_batch_by_batch_keeps_its_gradients():
    images = Images(torch.zeros(4, 1, 2, 2).__getitem__, torch.zeros(4))
    weight = torch.ones(1, requires_grad=True)
    reading = in_batches(lambda batch: batch * weight, images)
    first = next(reading)  # and the rest is never asked for
    assert torch.is_grad_enabled()
    assert not first.requires_grad
