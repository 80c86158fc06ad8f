"""Truncated SVD of a linear: exact at full rank, optimal below it, and the same every time."""

from __future__ import annotations

import pytest
import torch
from builders import TINY, dense_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from toolchain.compress.factorisations import FACTORISATIONS, factorise, truncated_svd
from toolchain.surgery.factorised import FactorisedLinear

SHAPES = [(12, 30), (30, 12), (16, 16), (1, 5), (5, 1)]


def linear(out: int, into: int, seed: int = 0, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(into, out, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 1, generator=generator)
    return layer


def inputs(into: int, seed: int = 1) -> Tensor:
    return torch.randn(7, into, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def error(pair: FactorisedLinear, layer: nn.Linear) -> float:
    return float((pair.up.weight.double() @ pair.down.weight.double() - layer.weight.double()).norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_is_the_linear(shape, bias):
    layer = linear(*shape, bias=bias)
    pair = truncated_svd(layer, min(shape))
    x = inputs(shape[1])
    with torch.no_grad():
        expected, found = layer(x), pair(x)
    assert (found - expected).abs().max() <= 1e-6 * max(1.0, float(expected.abs().max()))
    assert (pair.up.bias is not None) == bias


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_dtype_of_the_factors(shape):
    for dtype in (torch.float32, torch.float64):
        pair = truncated_svd(linear(*shape).to(dtype), 1)
        assert pair.down.weight.shape == (1, shape[1])
        assert pair.up.weight.shape == (shape[0], 1)
        assert {parameter.dtype for parameter in pair.parameters()} == {dtype}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), out=st.integers(2, 14), into=st.integers(2, 14), data=st.data())
def test_no_other_factors_of_that_rank_are_closer(seed, out, into, data):
    """Eckart–Young: the error is the tail of the spectrum; random factors, even with a best fit, are no closer."""
    layer = linear(out, into, seed)
    rank = data.draw(st.integers(1, min(out, into)))
    found = error(truncated_svd(layer, rank), layer)
    tail = torch.linalg.svdvals(layer.weight.detach().double())[rank:].square().sum().sqrt()
    assert found == pytest.approx(float(tail), abs=1e-5)
    generator = torch.Generator().manual_seed(seed)
    weight = layer.weight.detach().double()
    for _ in range(5):
        up = torch.randn(out, rank, generator=generator).double()
        down = torch.linalg.lstsq(up, weight).solution  # the best down for this up
        assert found <= float((up @ down - weight).norm()) + 1e-5


def test_a_better_rank_is_never_worse():
    layer = linear(12, 30)
    errors = [error(truncated_svd(layer, rank), layer) for rank in range(1, 13)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]


def test_factors_are_balanced_and_orthogonal():
    """Both factors train at one scale: upᵀup = down downᵀ = Σ."""
    layer = linear(12, 30)
    pair = truncated_svd(layer, 5)
    up, down = pair.up.weight.detach().double(), pair.down.weight.detach().double()
    sigma = torch.diag(torch.linalg.svdvals(layer.weight.detach().double())[:5])
    assert torch.allclose(up.T @ up, sigma, atol=1e-5)
    assert torch.allclose(down @ down.T, sigma, atol=1e-5)


def test_signs_are_canonical():
    """Whatever signs LAPACK picks: the largest entry of each column of up is positive."""
    layer = linear(12, 30)
    pair = truncated_svd(layer, 12)
    up = pair.up.weight.detach()
    assert bool((up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all())


def test_signs_do_not_follow_those_of_the_solver(monkeypatch):
    layer = linear(12, 30)
    expected = truncated_svd(layer, 6)
    svd = torch.linalg.svd

    def flipped(matrix: Tensor, *, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        left, values, right = svd(matrix, full_matrices=full_matrices)
        signs = torch.tensor([1.0, -1.0] * 6, dtype=left.dtype)
        return left * signs, values, signs[:, None] * right

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    found = truncated_svd(layer, 6)
    assert torch.equal(found.up.weight, expected.up.weight)
    assert torch.equal(found.down.weight, expected.down.weight)


def test_equal_weights_give_equal_factors_whatever_the_global_state():
    torch.manual_seed(0)
    one = truncated_svd(linear(12, 30), 6)
    torch.manual_seed(1)
    two = truncated_svd(linear(12, 30), 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_weight_of_zeros_stays_zero_and_finite():
    layer = linear(4, 6)
    nn.init.zeros_(layer.weight)
    pair = truncated_svd(layer, 2)
    assert all(torch.isfinite(parameter).all() for parameter in pair.parameters())
    with torch.no_grad():
        assert torch.equal(pair(inputs(6)), layer.bias.expand(7, 4))


@pytest.mark.parametrize("method", [each.factorise for each in FACTORISATIONS.values() if each.factorise])
def test_factorise_replaces_only_what_is_named(method):
    model = dense_model("vit_tiny_patch16_224", **TINY)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    factorise(model.module, {"blocks.0.attn.qkv": 5, "blocks.1.mlp.fc1": 7}, method)
    found = {name: child for name, child in model.module.named_modules() if isinstance(child, FactorisedLinear)}
    assert {name: child.down.out_features for name, child in found.items()} == {
        "blocks.0.attn.qkv": 5,
        "blocks.1.mlp.fc1": 7,
    }
    for name, tensor in model.module.state_dict().items():
        if not name.startswith(tuple(found)):
            assert torch.equal(tensor, before[name]), name
    assert not any(child.training for child in found.values())
    factorise(model.module, {}, method)
