from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from builders import dense_model
from kinds import torch_pruning as peers

from toolchain.cost import trace
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import BudgetError, RecipeError
from toolchain.surgery.replay import create_dense

pytestmark = pytest.mark.slow

KWARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def given():
    return dense_model(**KWARGS)


@pytest.fixture(scope="module")
def source():
    return open_source("digits", Wanted((1, 8, 8), {}, calibration_images=64))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"global_pruning": True},
        {"bottleneck": False},
        {"bottleneck": False, "global_pruning": True},
        {"prune_num_heads": True, "head_pruning_ratio": 0.5},
    ],
    ids=str,
)
def test_the_parameters_left_are_those_wanted_and_the_model_is_whole(given, source, options):
    made, facts = peers.prune(given, source, peers.Settings(params=0.5, taylor_batches=1, **options))
    dense = sum(p.numel() for p in given.module.parameters())
    left = sum(p.numel() for p in made.module.parameters())
    assert abs(left - 0.5 * dense) <= 0.01 * 0.5 * dense
    assert trace(made.module, made.family, made.preprocess.input_size).params == left
    with torch.no_grad():
        assert made.module(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert (facts["width"] == 32) == options.get("bottleneck", True)
    heads = {block["heads"] for block in facts["blocks"]}
    assert heads == ({1} if options.get("prune_num_heads") else {2})


def test_the_given_model_is_left_as_it_is(given, source):
    before = copy.deepcopy(given.module.state_dict())
    peers.prune(given, source, peers.Settings(params=0.5, taylor_batches=1))
    assert all(torch.equal(before[name], value) for name, value in given.module.state_dict().items())
    assert all(parameter.grad is None for parameter in given.module.parameters())


def test_the_same_model_is_pruned_alike_twice(given, source):
    settings = peers.Settings(params=0.5, taylor_batches=1, global_pruning=True)
    first, second = (peers.prune(given, source, settings)[0].module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_are_those_of_the_labels(given, source):
    right = peers.taylor_gradients(given.module, source, 1)
    shifted = copy.copy(source)
    images = source.split("calibration")
    wrong_labels = type(images)(images._load, (images._all_labels + 1) % 10, images.positions)
    object.__setattr__(shifted, "splits", {**source.splits, "calibration": wrong_labels})
    wrong = peers.taylor_gradients(given.module, shifted, 1)
    assert not torch.allclose(right["head.weight"], wrong["head.weight"])


def test_few_calibration_images_repeat(given, source):
    few = copy.copy(source)
    object.__setattr__(
        few, "splits", {**source.splits, "calibration": source.split("calibration").take(torch.arange(8))}
    )
    once, often = (peers.taylor_gradients(given.module, few, count) for count in (1, 2))
    assert torch.allclose(2 * once["head.weight"], often["head.weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", ["dense", "sdpa"])
def test_the_temperature_is_the_dense_models_where_that_is_asked_for(given, scale):
    """Attention with dimensions cut away equals the dense one with the same dimensions of q, k and v at zero."""
    whole = given.module.blocks[0].attn
    cut, kept = copy.deepcopy(whole), torch.tensor([0, 2, 3, 7])
    zeroed = copy.deepcopy(whole)
    d, heads = whole.head_dim, whole.num_heads
    rows = torch.cat([part * heads * d + head * d + kept for part in range(3) for head in range(heads)])
    gone = torch.ones(3 * heads * d, dtype=torch.bool).index_fill(0, rows, value=False)
    with torch.no_grad():
        zeroed.qkv.weight[gone], zeroed.qkv.bias[gone] = 0, 0
        cut.qkv.weight = torch.nn.Parameter(whole.qkv.weight[rows])
        cut.qkv.bias = torch.nn.Parameter(whole.qkv.bias[rows])
        columns = torch.cat([head * d + kept for head in range(heads)])
        cut.proj.weight = torch.nn.Parameter(whole.proj.weight[:, columns])
        cut.qkv.out_features = len(rows)
        peers.fit_attention(cut, heads, scale)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        same = torch.allclose(cut(x), zeroed(x), atol=1e-6)
    assert same == (scale == "dense")


def test_what_cannot_be_reached_is_an_error(given, source):
    with pytest.raises(BudgetError, match=r"were wanted: more than 1% away"):
        peers.prune(given, source, peers.Settings(params=0.01, taylor_batches=1))


def test_unknown_settings_are_refused():
    with pytest.raises(RecipeError, match="botleneck"):
        peers.Settings.of({"params": 0.5, "botleneck": True})
    with pytest.raises(RecipeError, match="scale"):
        peers.Settings.of({"params": 0.5, "scale": "none"})


def test_nothing_pruned_is_the_same_function(given, source):
    gradients = peers.taylor_gradients(given.module, source, 1)
    module = peers.pruned(given, gradients, peers.Settings(params=1.0), 0.0)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(module(x), given.module(x))
    fresh = replace(given, module=create_dense(given.ref))
    with torch.no_grad():
        assert not torch.equal(fresh.module(x), given.module(x))
