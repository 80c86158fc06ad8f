"""`UnitGroup` describes layouts that the shipped family does not have: separate q, k, v."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from toolchain.families import Span, UnitGroup
from toolchain.plan import CompressionPlan, Keep, ModelRef
from toolchain.surgery.mask import add_masks
from toolchain.surgery.slice import slice_module


class SeparateAttention(nn.Module):
    """Attention with q, k, v in linears of their own, as timm's EVA has it."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, head_dim, head_dim**-0.5
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim) for _ in range(3))
        self.proj = nn.Linear(heads * head_dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            f(x).reshape(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        x = functional.softmax(q * self.scale @ k.transpose(-2, -1), -1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))


def test_separate_qkv_is_the_same_declaration() -> None:
    torch.manual_seed(0)
    heads, head_dim = 3, 8
    model = nn.ModuleDict({"attn": SeparateAttention(24, heads, head_dim)}).eval()
    query = Span("attn.q", 0, 0, head_dim)
    spans = (query, Span("attn.k", 0, 0, head_dim), Span("attn.v", 0, 0, head_dim), Span("attn.proj", 1, 0, head_dim))
    attrs = {"head_dim": lambda kept: kept, "scale": lambda kept: kept**-0.5}
    group = UnitGroup("attn", "head_dim", head_dim, spans, heads, attrs=attrs, rescale_on_slice=(query,))
    keep = Keep(module="attn", unit="head_dim", total=head_dim, indices=((0, 1, 5), (2, 3, 4), (1, 6, 7)))
    plan = CompressionPlan(model=ModelRef(name="test"), keeps=(keep,))
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        dense = model["attn"](x)
        sliced = SeparateAttention(24, heads, head_dim).eval()
        sliced.load_state_dict(model["attn"].state_dict())
        wrapped = nn.ModuleDict({"attn": sliced})
        slice_module(wrapped, plan, [group])
        add_masks(model, plan, [group])
        masked = model["attn"](x)
        assert sliced.q.weight.shape == (9, 24)
        assert torch.allclose(masked, sliced(x), atol=1e-6)
        assert not torch.allclose(masked, dense, atol=1e-3)
