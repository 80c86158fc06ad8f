"""timm's attention in fewer ONNX nodes.

As timm writes it, query, key and value are unbound from one tensor by a Slice and a Squeeze each, and the query is scaled
in every call: 7 nodes a block that compute nothing. Here it is one Split, and the scale is in the weights of the query. Swin V2
and timm's RelPosMlp compute a bias table from coordinates in every call: here it is the table.
"""

from __future__ import annotations

import torch
from timm.layers.attention import Attention
from torch import nn

from toolchain.families.constants import constants


class LeanAttention(Attention):
    """timm's `Attention`, with the scale of the query in the weights of `qkv` where no norm lies between."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """[B, N, C] → [B, N, C]: proj(softmax(q kᵀ) v), with all heads of q, k and v split from one tensor.

        A mask is timm's own business.
        """
        if attn_mask is not None or is_causal:
            masked: torch.Tensor = super().forward(x, attn_mask, is_causal)
            return masked
        batch, tokens, _ = x.shape
        heads = self.qkv(x).reshape(batch, tokens, 3 * self.num_heads, self.head_dim).transpose(1, 2)
        q, k, v = heads.split(self.num_heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.scale != 1:
            q = q * self.scale
        mixed = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        mixed = self.norm(mixed.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        if (gate := getattr(self, "gate", None)) is not None:
            mixed = mixed * gate(x).sigmoid()
        projected: torch.Tensor = self.proj(mixed)
        return projected


class Known(nn.Module):
    """Replaces a module whose input never changes by the value that it computed."""

    value: torch.Tensor

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """The value."""
        return self.value


@torch.no_grad()
def lean(module: nn.Module) -> nn.Module:
    """The module, in eval mode, with each timm `Attention` in it made lean in place; subclasses of it are left alone.

    What attention of Swin V2 and of relative positions computes from coordinates alone is computed once.

    Args:
        module: a copy that nobody else uses; its `qkv` may be `nn.Sequential` of linears.
    """
    for constant in list(constants(module)):
        setattr(constant.owner, constant.name, Known(constant.part(constant.given)))
    for part in list(module.modules()):
        if type(part) is not Attention:
            continue
        part.__class__ = LeanAttention
        part.fused_attn = False  # type: ignore[misc]  # fused attention would scale the query by itself
        if isinstance(part.q_norm, nn.Identity):
            linears = [each for each in part.qkv.modules() if isinstance(each, nn.Linear)]
            rows = part.num_heads * part.head_dim
            for values in (linears[-1].weight, linears[-1].bias):
                if values is not None:
                    values[:rows] *= part.scale
            part.scale = 1.0
    return module
