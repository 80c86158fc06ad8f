"""Modules in the place of timm's: the same function, with weights from the same files, and heads that may be narrower."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from builders import STRUCTURES, named, random_plan, randomise, variant
from timm.layers.attention_pool import AttentionPoolLatent

from toolchain.compress.branches import first_residual
from toolchain.compress.reductions import AttentionReduction
from toolchain.compress.sensitivity import Sensitivity
from toolchain.families import Pooling, adapt, family_of
from toolchain.families.naflex import NAFLEX
from toolchain.families.narrow import NARROW
from toolchain.families.pooling import POOL
from toolchain.model import run_stage
from toolchain.surgery.mask import mask_model
from toolchain.surgery.slice import Slice

APART = [
    case
    for case in ("BEiT", "parallel scaling", "parallel scaling, normed", "differential, parallel")
    if case in STRUCTURES
]
"""Those of which timm keeps parts of a linear apart."""


def images(size: tuple[int, int, int], count: int = 3) -> torch.Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", APART)
def test_a_published_checkpoint_loads_into_an_adapted_model(case):
    name, kwargs = named(case)
    published = randomise(timm.create_model(name, **kwargs).eval(), seed=3)
    model = variant(case)
    size = family_of(model.module, name).input_size(model.module)
    state = model.family.convert_checkpoint(published.state_dict(), model.module)
    with torch.no_grad():
        before = model.module(images(size))
        model.module.load_state_dict(state, strict=True)
        wanted = published(images(size))
        torch.testing.assert_close(model.module(images(size)), wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, wanted, atol=1e-3)
    again = model.family.convert_checkpoint(model.module.state_dict(), model.module)
    assert again.keys() == model.module.state_dict().keys()


def test_a_subclass_of_timms_is_left_alone():
    """It may compute something else with the same parts."""
    name, kwargs = named("attention pool")
    model = timm.create_model(name, **kwargs)

    class Other(type(model.attn_pool)):  # type: ignore[misc]
        pass

    model.attn_pool.__class__ = Other
    adapt(model)
    assert type(model.attn_pool) is Other
    assert "attn_pool is a Other" in str(family_of(variant("classic").module, "").refuses(model))


def test_every_module_is_taken_for_timms_and_back():
    """What takes the place of a module of timm's is one of its kind."""
    assert all(issubclass(other, stock) for stock, other in NARROW.items())


def test_a_parallel_block_has_no_mask():
    model = variant("parallel scaling").module
    with pytest.raises(NotImplementedError, match="without a mask"):
        model.blocks[0](torch.zeros(1, 4, 48), attn_mask=torch.zeros(4, 4))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("seen", [torch.arange(5) < 3, torch.tensor([0.0, 1.0, -2.0, 0.5, float("-inf")])])
def test_a_pool_with_a_mask_is_timms_and_may_be_narrower(fused, seen):
    model, mask = variant("attention pool"), seen.expand(2, 1, 1, 5)
    pool, x = model.module.attn_pool, torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    stock = copy.deepcopy(pool)
    stock.__class__ = AttentionPoolLatent
    pool.fused_attn = fused
    with torch.no_grad():
        torch.testing.assert_close(pool(x, mask), stock(x, mask), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(pool(x, mask), pool(x), atol=1e-3)
        smaller = run_stage(Slice(), mask_model(model, model.module, random_plan(model, low_rank=False))).artifact
        pool, other = smaller.module.attn_pool, x.clone()
        pool.fused_attn = fused
        other[:, 4] += 1  # what no query sees
        torch.testing.assert_close(pool(other, mask), pool(x, mask))
    assert pool.head_dim < 16


def test_an_attention_pool_is_two_branches_and_the_mlp_is_the_seconds_alone():
    model = variant("attention pool")
    seen, added = model.family.blocks(model.module)[-1].branches
    assert isinstance(seen, Pooling)
    assert (seen.holds(f"{POOL}.kv"), seen.holds(f"{POOL}.mlp.fc1"), seen.holds("attn_pooling")) == (True, False, False)
    assert (added.holds(f"{POOL}.mlp.fc1"), added.holds(f"{POOL}.kv")) == (True, False)
    site = model.family.attentions(model.module)[-1]
    assert (site.module, site.queries) == (POOL, 1)


def test_one_latent_query_needs_one_direction_of_every_head():
    """The query is a constant, so one number of each key is all that is asked of it."""
    model = variant("attention pool")
    x = images(model.preprocess.input_size, 32)
    data = torch.utils.data.TensorDataset(x, torch.zeros(len(x), dtype=torch.long))
    with torch.no_grad():
        stream = first_residual(model.module, "blocks.0", data)
        *before, pool = model.family.blocks(model.module)
        for block in before:
            for step in block.steps:
                stream = [step(model.module, each) for each in stream]
        wanted = model.module(x)
        (group,) = (group for group in model.groups if (group.module, group.unit) == (POOL, "head_dim"))
        care = Sensitivity.flat(48, 1)
        reduction = AttentionReduction(model.module, pool.branches[0], group, stream, care)
        for role in ("query", "key"):
            weight, bias = reduction.heads.weight(role), reduction.heads.bias(role)
            weight[:, 1:], bias[:, 1:] = 0, 0
            reduction.heads.write(role, weight, bias)
        torch.testing.assert_close(model.module(x), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("naflexvit_base_patch16_gap", {"pos_embed_grid_size": [3, 2]}, (48, 32)),
        ("vit_tiny_patch16_224", {"use_naflex": True, "img_size": (32, 64)}, (32, 64)),
    ],
)
def test_a_naflex_model_has_the_size_of_its_positions(name, kwargs, size):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1, embed_dim=48, num_heads=3, **kwargs)
    assert NAFLEX.matches(model)
    assert NAFLEX.input_size(model) == (3, *size)
    assert NAFLEX.patch_size(model) == (16, 16)


def test_a_rotary_naflex_model_keeps_its_head_dims():
    model = variant("NaFlex rotary")
    assert "head_dim" not in {group.unit for group in model.groups}
    (reason,) = model.family.restrictions(model.module)
    assert "rotary position embeddings" in reason


def test_declared_attributes_of_a_narrow_module_are_those_of_the_module():
    for case in ("attention pool", "parallel scaling", "BEiT", "relative position MLP"):
        model = variant(case)
        groups = [group for group in model.groups if group.unit == "head_dim"]
        assert groups
        for group in groups:
            owner = model.module.get_submodule(group.module)
            assert {name: value(group.total) for name, value in group.attrs.items()} == {
                name: pytest.approx(getattr(owner, name)) for name in group.attrs
            }
