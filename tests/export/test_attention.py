"""Lean attention: the same function as timm's, in fewer nodes, and the given module untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import dense_model
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.attention import Attention
from torch import nn

from toolchain.export.attention import LeanAttention, lean
from toolchain.export.onnx_graph import export_onnx


def attention(dim=24, heads=3, **kwargs):
    torch.manual_seed(0)
    made = Attention(dim, heads, **{"qkv_bias": True, **kwargs}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


@pytest.mark.slow
@settings(max_examples=40)
@given(
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 9),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 6),
    bias=st.booleans(),
    qk_norm=st.booleans(),
    scale_norm=st.booleans(),
    rank=st.sampled_from([None, 1, 5]),
)
def test_it_is_the_same_function(heads, head_dim, batch, tokens, bias, qk_norm, scale_norm, rank):
    before = attention(
        12,
        heads,
        attn_head_dim=head_dim,
        qkv_bias=bias,
        qk_norm=qk_norm,
        scale_norm=scale_norm,
        norm_layer=nn.LayerNorm,
    )
    if rank is not None:
        before.qkv = nn.Sequential(nn.Linear(12, rank, bias=False), nn.Linear(rank, 3 * heads * head_dim, bias=bias))
    after = lean(copy.deepcopy(before))
    assert type(after) is LeanAttention
    assert (after.scale == 1) is (not qk_norm or head_dim == 1)
    x = torch.randn(batch, tokens, 12)
    torch.testing.assert_close(after(x), before(x), atol=1e-5, rtol=1e-5)


def test_a_gate_is_kept():
    before = attention()
    if not hasattr(before, "gate"):
        pytest.skip("this timm has no gated attention")
    before = attention(gated=True)
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(lean(copy.deepcopy(before))(x), before(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_mask_still_masks(fused):
    before = attention()
    before.fused_attn = fused
    after = lean(copy.deepcopy(before))
    x, mask = torch.randn(2, 5, 24), torch.full((5, 5), -torch.inf).triu(1)
    assert (before(x, attn_mask=mask) - before(x)).abs().max() > 0.01
    torch.testing.assert_close(after(x, attn_mask=mask), before(x, attn_mask=mask), atol=1e-5, rtol=1e-5)


def test_subclasses_are_left_alone():
    class Theirs(Attention):
        pass

    theirs = Theirs(24, 3).eval()
    weights = theirs.qkv.weight.clone()
    assert type(lean(theirs)) is Theirs
    assert torch.equal(theirs.qkv.weight, weights)


@pytest.mark.parametrize("simplify", [True, False])
def test_the_graph_has_one_split_a_block_and_neither_slices_nor_scales(tmp_path, simplify):
    model = dense_model(num_classes=7, img_size=32, patch_size=16, embed_dim=48, depth=2)
    before = copy.deepcopy(model.module.state_dict())
    made = export_onnx(
        model.module, tmp_path / "x.onnx", input_size=(3, 32, 32), opset=20, metadata={}, simplify=simplify
    )
    assert made.nodes_after["Split"] == 2
    assert made.nodes_after["Slice"] == 2, "the token that is read, of the last queries and of what is added to"
    assert not {"Slice", "Squeeze", "Mul", "Div", "Sqrt"} & set(made.nodes_before)
    assert made.nodes_after["Transpose"] == 3 * 2 + 1
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert type(model.module.blocks[0].attn) is Attention
