"""Importance of neurons against its definition, computed the slow way on the model itself."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from builders import STRUCTURES, TINY, dense_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from toolchain.compress.criteria import CRITERIA, Evidence, input_moments, input_taylor
from toolchain.compress.factorisations import factorise, truncated_svd
from toolchain.model import TimmModel
from toolchain.recipe import CompressSection

SECTION = CompressSection()
SCORES = [name for name, criterion in CRITERIA.items() if criterion.score and not criterion.needs.training]
LAYOUTS = {
    "Mlp": {},
    "packed SwiGLU": {"name": "vit_giant_patch14_dinov2", "img_size": 28, "patch_size": 14},
}
EVERY = {**LAYOUTS, "parallel scaling": STRUCTURES["parallel scaling"]}
COUNT = 100  # a batch and a smaller one


def build(layout: str = "Mlp") -> TimmModel:
    kwargs = {**TINY, **EVERY[layout]}
    return dense_model(str(kwargs.pop("name", "vit_tiny_patch16_224")), **kwargs)


def images(model: TimmModel, count: int = COUNT, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    shape = model.preprocess.input_size
    return TensorDataset(
        torch.randn(count, *shape, generator=generator), torch.randint(0, 7, (count,), generator=generator)
    )


def evidence(model: TimmModel, module: nn.Module | None = None, **change: object) -> Evidence:
    groups = [group for group in model.groups if group.unit == "mlp_hidden"]
    known = {"module": module or model.module, "groups": groups, "images": images(model), "section": SECTION}
    return Evidence(**{**known, **change})


def hidden(model: TimmModel, x: Tensor, block: int = 0) -> Tensor:
    """What enters fc2 of one block, [B, N, M]."""
    seen = []
    handle = model.module.blocks[block].mlp.fc2.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model.module(x)
    handle.remove()
    return seen[0]


def order(scores: Tensor) -> list[int]:
    return scores.argsort(descending=True, stable=True).tolist()


def spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double())[0, 1])


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("criterion", SCORES)
def test_every_criterion_scores_every_neuron_and_changes_nothing(criterion, layout):
    model = build(layout)
    given = evidence(model)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    state = torch.random.get_rng_state()
    scores = CRITERIA[criterion].score(given)
    assert list(scores) == [(group.module, group.unit) for group in given.groups]
    for group in given.groups:
        found = scores[group.module, group.unit]
        assert found.shape == (group.total,)
        assert found.dtype == torch.float64
        assert not found.requires_grad
        assert torch.isfinite(found).all()
        assert (found >= 0).all()
        assert found.unique().numel() > group.total // 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert not any(module._forward_pre_hooks for module in model.module.modules())


@pytest.mark.parametrize("criterion", SCORES)
def test_every_criterion_gives_the_same_scores_again(criterion):
    model = build()
    torch.manual_seed(1)
    one = CRITERIA[criterion].score(evidence(model))
    torch.manual_seed(2)
    two = CRITERIA[criterion].score(evidence(model))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitude_is_the_product_of_the_norms(layout):
    model = build(layout)
    scores = CRITERIA["magnitude"].score(evidence(model))
    mlp = model.module.blocks[1].mlp
    total = mlp.fc2.in_features
    for j in range(0, total, 17):
        rows = [mlp.fc1.weight[j]] + ([mlp.fc1.weight[j + total]] if layout == "packed SwiGLU" else [])
        inward = math.sqrt(sum(float(row.detach().double().square().sum()) for row in rows))
        outward = float(mlp.fc2.weight[:, j].detach().double().norm())
        assert float(scores["blocks.1.mlp", "mlp_hidden"][j]) == pytest.approx(inward * outward, rel=1e-9)


def test_magnitude_is_blind_to_how_a_neuron_shares_its_scale():
    """w_in·c and w_out/c is the same neuron to a positively homogeneous activation, so the same score."""
    model = build()
    before = CRITERIA["magnitude"].score(evidence(model))
    mlp = model.module.blocks[0].mlp
    factors = torch.exp(torch.randn(mlp.fc1.out_features, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        mlp.fc1.weight.mul_(factors[:, None])
        mlp.fc2.weight.div_(factors)
    after = CRITERIA["magnitude"].score(evidence(model))
    assert all(torch.allclose(before[key], after[key], rtol=1e-5) for key in before)
    with torch.no_grad():
        mlp.fc2.weight[:, 3] *= 10
    assert not torch.allclose(CRITERIA["magnitude"].score(evidence(model))["blocks.0.mlp", "mlp_hidden"][3],
                              after["blocks.0.mlp", "mlp_hidden"][3])  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_is_the_energy_lost_when_a_neuron_becomes_its_mean(layout):
    model = build(layout)
    data = images(model)
    found = CRITERIA["variance"].score(evidence(model, images=data))
    for block in range(2):
        h = hidden(model, data.tensors[0], block).flatten(0, 1).double()  # [B·N, M]
        w = model.module.blocks[block].mlp.fc2.weight.detach().double()  # [D, M]
        for j in range(0, h.shape[1], 29):
            lost = torch.outer(h[:, j] - h[:, j].mean(), w[:, j]).square().sum(1).mean()  # per token
            assert float(found[f"blocks.{block}.mlp", "mlp_hidden"][j]) == pytest.approx(float(lost), rel=1e-5)


def test_moments_are_those_of_all_tokens_whatever_the_batches():
    model = build()
    data = images(model)
    found = input_moments(model.module, ["blocks.0.mlp.fc2", "blocks.1.attn.proj"], data)
    h = hidden(model, data.tensors[0]).flatten(0, 1).double()
    assert torch.allclose(found["blocks.0.mlp.fc2"][0], h.mean(0), atol=1e-6)
    assert torch.allclose(found["blocks.0.mlp.fc2"][1], h.var(0, correction=0), atol=1e-6)
    assert set(found) == {"blocks.0.mlp.fc2", "blocks.1.attn.proj"}
    assert not any(m._forward_pre_hooks for m in model.module.modules())


def test_variance_is_never_negative_where_a_neuron_is_constant():
    model = build()
    mlp = model.module.blocks[0].mlp
    with torch.no_grad():
        mlp.fc1.weight[5].zero_()
        mlp.fc1.bias[5] = 1000.0
    found = CRITERIA["variance"].score(evidence(model))["blocks.0.mlp", "mlp_hidden"]
    assert 0 <= float(found[5]) <= 1e-6
    assert order(found)[-1] == 5


# Taylor


def loss_without(model: TimmModel, x: Tensor, y: Tensor, j: int, share: float = 1.0) -> Tensor:
    """The loss of each image when neuron j of block 0 is multiplied by 1 − share; float64 [B]."""
    fc2 = model.module.blocks[0].mlp.fc2

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        h = args[0].clone()
        h[..., j] *= 1 - share
        return (h,)

    handle = fc2.register_forward_pre_hook(hook)
    with torch.no_grad():
        loss = functional.cross_entropy(model.module(x), y, reduction="none")
    handle.remove()
    return loss


def test_taylor_is_the_slope_of_the_loss_as_a_neuron_fades():
    """|Σ h·∂L/∂h| per image is |dL/ds| at s = 0; central differences in float64."""
    model = build()
    model.module.double()
    x, y = images(model, 8).tensors
    data = TensorDataset(x.double(), y)
    found = CRITERIA["taylor"].score(evidence(model, images=data))["blocks.0.mlp", "mlp_hidden"]
    step, mixed = 1e-5, 0
    for j in range(0, len(found), 23):
        ahead, behind = (loss_without(model, x.double(), y, j, share) for share in (step, -step))
        slopes = (ahead - behind) / (2 * step)  # [B], signed
        mixed += bool((slopes > 0).any() and (slopes < 0).any())
        assert float(found[j]) == pytest.approx(float(slopes.abs().sum()), rel=1e-5)
    assert mixed, "no neuron helps one image and hurts another: the sum and its absolute value would be the same"


def test_taylor_ranks_as_the_true_change_of_the_loss_does():
    model = build()
    model.module.double()
    x, y = images(model, 16).tensors
    x = x.double()
    found = CRITERIA["taylor"].score(evidence(model, images=TensorDataset(x, y)))["blocks.0.mlp", "mlp_hidden"][::4]
    base = functional.cross_entropy(model.module(x), y, reduction="none").detach()
    true = torch.stack([(loss_without(model, x, y, 4 * j) - base).abs().sum() for j in range(len(found))])
    assert spearman(found, true) > 0.9


def test_taylor_without_labels_uses_the_models_own_prediction():
    model = build()
    x, _ = images(model).tensors
    with torch.no_grad():
        own = model.module(x).argmax(1)
    names = ["blocks.0.mlp.fc2"]
    unlabelled = input_taylor(model.module, names, TensorDataset(x, torch.full((len(x),), -1)))
    labelled = input_taylor(model.module, names, TensorDataset(x, own))
    assert torch.equal(unlabelled[names[0]], labelled[names[0]])
    wrong = input_taylor(model.module, names, TensorDataset(x, (own + 1) % 7))
    assert not torch.allclose(wrong[names[0]], labelled[names[0]])


def test_taylor_counts_an_image_once_whatever_its_batch():
    model = build()
    x, y = images(model).tensors
    name = "blocks.1.mlp.fc2"
    whole = input_taylor(model.module, [name], TensorDataset(x, y))[name]
    parts = [input_taylor(model.module, [name], TensorDataset(x[i : i + 25], y[i : i + 25]))[name]
             for i in range(0, COUNT, 25)]  # fmt: skip
    assert torch.allclose(whole, torch.stack(parts).sum(0), rtol=1e-4)


@pytest.mark.parametrize("layout", EVERY)
@pytest.mark.parametrize("criterion", ["magnitude", "variance", "taylor"])
def test_a_dead_neuron_is_the_least_important(criterion, layout):
    model = build(layout)
    group = next(group for group in model.groups if group.unit == "mlp_hidden")
    reader = next(span for span in group.spans if span.axis == 1)
    with torch.no_grad():
        model.module.get_submodule(reader.linear).weight[:, reader.offset + 11] = 0
    scores = CRITERIA[criterion].score(evidence(model))[group.module, "mlp_hidden"]
    assert float(scores[11]) == 0
    assert order(scores)[-1] == 11


# Others


def test_random_follows_the_seed_and_differs_between_layers():
    model = build()
    one, other = (
        CRITERIA["random"].score(evidence(model)),
        CRITERIA["random"].score(evidence(model, section=CompressSection(seed=1))),
    )
    first, second = one.values()
    assert not torch.equal(first, second)
    assert not torch.equal(first, other["blocks.0.mlp", "mlp_hidden"])


@pytest.mark.parametrize("criterion", SCORES)
def test_a_factorised_mlp_is_scored_through_its_factors(criterion):
    """`up` holds the rows, `down` the columns: at full rank the measured criteria see the same function."""
    model = build()
    module = copy.deepcopy(model.module)
    factorise(module, {"blocks.0.mlp.fc1": 48, "blocks.0.mlp.fc2": 48}, truncated_svd)
    dense, pair = CRITERIA[criterion].score(evidence(model)), CRITERIA[criterion].score(evidence(model, module))
    key = ("blocks.0.mlp", "mlp_hidden")
    assert pair[key].shape == dense[key].shape
    if criterion in ("taylor", "random"):
        assert torch.allclose(pair[key], dense[key], rtol=1e-3, atol=1e-6)
