"""Twins of timm's modules that assume head_dim = width / heads, in which heads may be narrower.

At full size each is the function that timm's is, with the same children under the same names; `narrow` puts it in place of
timm's. What timm computes outside a linear (a bias that is kept beside it, a product split over two linears) is moved into the
linear, so that it can be counted, observed and replaced.

Legend: B images, N tokens, D width, H heads, d head dim, M hidden neurons, L latent tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.beit import Attention as BeitAttention
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn
from torch.nn import functional


def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d + bias) v, [B, N, H·d], of q, k and v [B, H, *, d], fused or not as the module is told to."""
    drop: nn.Module = getattr(module, "attn_drop", nn.Identity())
    if module.fused_attn:
        rate = float(getattr(drop, "p", 0.0)) if module.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=rate)
    else:
        logits = (q * float(module.scale)) @ k.transpose(-2, -1)  # type: ignore[arg-type]
        weights = drop((logits if bias is None else logits + bias).softmax(dim=-1))
        mixed = weights @ v
    return mixed.transpose(1, 2).flatten(2)


def in_heads(x: Tensor, heads: int) -> Tensor:
    """[B, H, N, d] of [B, N, H·d]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def heads_of(module: nn.Module, fused: Tensor) -> tuple[Tensor, ...]:
    """q, k and v [B, H, N, d] of the output [B, N, 3·H·d] of one linear."""
    batch, tokens, _ = fused.shape
    parts = fused.reshape(batch, tokens, 3, module.num_heads, -1)  # type: ignore[call-overload]
    return tuple(parts.permute(2, 0, 3, 1, 4).unbind(0))


class NarrowRelPosAttention(RelPosAttention):
    """timm's `RelPosAttention`."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, N, D]; the bias [1, H, N, N] is the attention's own, or all blocks'."""
        q, k, v = heads_of(self, self.qkv(x))
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()  # type: ignore[operator]
        projected: Tensor = self.proj_drop(self.proj(attend(self, self.q_norm(q), self.k_norm(k), v, bias)))
        return projected


class NarrowBeitAttention(BeitAttention):
    """timm's attention of BEiT; its biases of query and value are those of `qkv`, with zeros for the keys."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, N, D]; the biases [1, H, N, N] of the attention and of all blocks are added up."""
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        q, k, v = heads_of(self, self.qkv(x))
        projected: Tensor = self.proj_drop(self.proj(attend(self, q, k, v, bias)))
        return projected


class NarrowLatentPool(AttentionPoolLatent):
    """timm's `AttentionPoolLatent`, in three steps."""

    def attend(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, L, D]: what the latent queries see of tokens [B, N, D]; a bias, up to [B, H, L, N], is added to the logits."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = in_heads(self.q(self.latent.expand(len(x), -1, -1)), self.num_heads)
        k, v = (in_heads(part, self.num_heads) for part in self.kv(x).chunk(2, dim=-1))
        projected: Tensor = self.proj_drop(self.proj(attend(self, self.q_norm(q), self.k_norm(k), v, bias)))
        return projected

    def pooled(self, x: Tensor) -> Tensor:
        """[B, D] of [B, L, D]; as it is where latents are not pooled."""
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """[B, N, D] → [B, D]; a mask is a bias, or says with True which tokens are seen."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask, float("-inf"))
        x = self.attend(x, attn_mask)
        mlp: Tensor = self.mlp(self.norm(x))
        return self.pooled(x + mlp)


class NarrowParallelBlock(ParallelScalingBlock):
    """timm's `ParallelScalingBlock`, with one linear `out_proj` [D, H·d + M] as well as `in_proj` [M + 3·H·d, D]."""

    def added(self, x: Tensor) -> Tensor:
        """What is added to x [B, N, D], before the scale."""
        return beside(self, x, self.num_heads * self.head_dim)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, H·d] of three of them."""
        q, k, v = (in_heads(part, self.num_heads) for part in (q, k, v))
        return attend(self, self.q_norm(q), self.k_norm(k), v)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] → [B, N, D]; images have no mask."""
        _without_mask(attn_mask, is_causal)
        after: Tensor = x + self.drop_path(self.ls(self.added(x)))
        return after


class NarrowDiffParallelBlock(DiffParallelScalingBlock):
    """timm's `DiffParallelScalingBlock`: attention is the difference of two, each with queries and keys half as wide."""

    def added(self, x: Tensor) -> Tensor:
        """What is added to x [B, N, D], before the scale."""
        return beside(self, x, 2 * self.num_heads * self.head_dim)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, 2·H·d] of three of them, d of q and k."""
        q, k, v = in_heads(q, 2 * self.num_heads), in_heads(k, 2 * self.num_heads), in_heads(v, self.num_heads)
        weights = ((self.q_norm(q) * self.scale) @ self.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
        weights = self.attn_drop(weights)
        first, second = weights[:, 0::2], weights[:, 1::2]
        mixed = (first - self._compute_lambda().type_as(q) * second) @ v
        normed: Tensor = self.sub_norm(mixed) * (1 - self.lambda_init)
        return normed.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] → [B, N, D]; images have no mask."""
        _without_mask(attn_mask, is_causal)
        after: Tensor = x + self.drop_path(self.ls(self.added(x)))
        return after


NarrowParallel = NarrowParallelBlock | NarrowDiffParallelBlock
"""Attention and MLP side by side."""


def beside(block: NarrowParallel, x: Tensor, wide: int) -> Tensor:
    """What attention and MLP of a block make together of x [B, N, D], before the scale; `wide` outputs are attention's."""
    y: Tensor = block.in_proj(block.in_norm(x))
    hidden, q, k, v = torch.split(y, [y.shape[-1] - 3 * wide, wide, wide, wide], dim=-1)
    hidden = block.mlp_drop(block.mlp_act(hidden))
    projected: Tensor = block.out_proj(torch.cat((block.mix(q, k, v), hidden), dim=-1))
    return projected


def _without_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise NotImplementedError("a parallel block of slimvit attends to all tokens of an image, without a mask")


NARROW: dict[type[nn.Module], type[nn.Module]] = {
    RelPosAttention: NarrowRelPosAttention,
    BeitAttention: NarrowBeitAttention,
    AttentionPoolLatent: NarrowLatentPool,
    ParallelScalingBlock: NarrowParallelBlock,
    DiffParallelScalingBlock: NarrowDiffParallelBlock,
}
"""timm's module → what takes its place. A subclass of timm's may compute something else, and stays."""


@torch.no_grad()
def narrow(model: nn.Module) -> None:
    """Puts every module of timm's that is in `NARROW` into its other form, in place; the model stays the same function.

    Names of parameters change where timm keeps parts of a linear apart: `narrow_state` changes those of a checkpoint.
    """
    for module in list(model.modules()):
        if (other := NARROW.get(type(module))) is None:
            continue
        module.__class__ = other
        if isinstance(module, NarrowBeitAttention):
            _join(module)
        elif isinstance(module, NarrowParallel):
            _gather(module)


def narrow_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A checkpoint under timm's names under those of a model that went through `narrow`; what has none of them stays."""
    state = dict(state)
    for path, module in model.named_modules():
        at = f"{path}."
        if isinstance(module, NarrowBeitAttention) and f"{at}q_bias" in state:
            state[f"{at}qkv.bias"] = _three(state.pop(f"{at}q_bias"), state.pop(f"{at}v_bias"))
        if not isinstance(module, NarrowParallel):
            continue
        if (bias := state.pop(f"{at}mlp_bias", None)) is not None:
            state[f"{at}in_proj.bias"] = _filled(bias, len(state[f"{at}in_proj.weight"]))
        if f"{at}attn_out_proj.weight" in state:
            weights, biases = (
                [state.pop(f"{at}{part}_out_proj.{kind}", None) for part in ("attn", "mlp")]
                for kind in ("weight", "bias")
            )
            state[f"{at}out_proj.weight"] = torch.cat([each for each in weights if each is not None], dim=1)
            if biases[0] is not None and biases[1] is not None:
                state[f"{at}out_proj.bias"] = biases[0] + biases[1]
    return state


def _join(attention: Any) -> None:
    """One bias of an attention of BEiT, from those that timm keeps apart."""
    attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
    if attention.q_bias is not None:
        _set_bias(attention.qkv, _three(attention.q_bias, attention.v_bias))
        attention.q_bias = attention.k_bias = attention.v_bias = None


def _gather(block: Any) -> None:
    """One bias and one output linear of a parallel block, from those that timm keeps apart."""
    if block.mlp_bias is not None:
        _set_bias(block.in_proj, _filled(block.mlp_bias, block.in_proj.out_features))
        block.mlp_bias = None
    if block.out_proj is None:
        attention, mlp = block.attn_out_proj, block.mlp_out_proj
        with torch.device("meta"):
            linear = nn.Linear(attention.in_features + mlp.in_features, attention.out_features, bias=False)
        linear.weight = nn.Parameter(torch.cat((attention.weight, mlp.weight), dim=1))
        if attention.bias is not None:
            _set_bias(linear, attention.bias + mlp.bias)
        block.out_proj, block.attn_out_proj, block.mlp_out_proj = linear, None, None


def _three(query: Tensor, value: Tensor) -> Tensor:
    """The bias of q, k and v; timm's BEiT has none for the keys."""
    return torch.cat((query, torch.zeros_like(query), value))


def _filled(bias: Tensor, size: int) -> Tensor:
    """A bias of neurons as one of `in_proj`: zeros for q, k and v, which come after them."""
    return functional.pad(bias, (0, size - len(bias)))


def _set_bias(linear: nn.Linear, bias: Tensor) -> None:
    linear.bias = nn.Parameter(bias.detach().clone())
