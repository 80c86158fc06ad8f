"""How far outputs are apart: each likelihood against torch's own distributions, and what its gradients say."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Bernoulli as Coin
from torch.distributions import Categorical as Die
from torch.distributions import Normal, kl_divergence

from toolchain.data import Images
from toolchain.errors import DataError
from toolchain.likelihood import SPREAD_FLOOR, Bernoulli, Categorical, Gaussian, likelihood_of, outputs_of
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
