"""The attention pool of timm's: a few latent queries look at all tokens, and what they see goes through one MLP.

SigLIP, Zhai et al. 2023, arXiv 2303.15343; Set Transformer, Lee et al. 2019, arXiv 1810.00825.
"""

from __future__ import annotations

from functools import partial

from timm import layers
from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Branch, Pooling, Span, UnitGroup, pre_norm
from toolchain.families.blocks import (
    INSTEAD,
    Layer,
    Part,
    attention_linears,
    head_dim_group,
    linear,
    mlp_part,
    normed_heads,
    site_of,
)
from toolchain.families.narrow import NarrowLatentPool

POOL = "attn_pool"
REFINING: tuple[type[nn.Module], ...] = tuple(filter(None, [getattr(layers, "AttentionPoolPrr", None)]))
"""Attention without weights, over all tokens, before they are pooled; older timm has none."""


def latent_pool(model: nn.Module) -> NarrowLatentPool | None:
    """The attention pool of a model whose tokens latent queries look at, or None."""
    pool = getattr(model, POOL, None)
    return pool if isinstance(pool, NarrowLatentPool) else None


def refused_output(model: nn.Module) -> str | None:
    """Why the way from the last block to the outputs is not supported, or None."""
    if model.global_pool == "" and model.num_classes and not isinstance(getattr(model, "head", None), nn.Identity):
        return (
            "it gives a row of logits per token (global_pool ''); set model.kwargs.global_pool to 'token' or 'avg', or "
            "model.kwargs.num_classes to 0 for the tokens themselves"
        )
    pool = getattr(model, POOL, None)
    if pool is None or type(pool) in REFINING or (type(pool) is NarrowLatentPool and pool.mlp is not None):
        return None
    return (
        f"{POOL} is a {type(pool).__name__}; only AttentionPoolLatent with its MLP and AttentionPoolPrr are supported"
    )


def refining_site(model: nn.Module) -> list[AttentionSite]:
    """The attention without weights before the pooling of a model; nothing for the others."""
    pool = getattr(model, POOL, None)
    if not isinstance(pool, REFINING):
        return []
    return [site_of(pool, POOL)]


def looked_at(model: nn.Module, x: Tensor) -> Tensor:
    """The tokens that the pool of a model sees, of the stream after the last block."""
    x = model.get_submodule("norm")(x)
    everything = getattr(model, "pool_include_prefix", True)
    return x if everything else x[:, int(model.num_prefix_tokens) :]  # type: ignore[arg-type]


def _attend(model: nn.Module, x: Tensor) -> Tensor:
    pool = latent_pool(model)
    assert pool is not None
    return pool.attend(looked_at(model, x))


def pool_layers(pool: NarrowLatentPool) -> list[Layer]:
    """The two branches of a pool: what its queries see takes the place of the stream, and the MLP is added to that."""
    mlp, latents = f"{POOL}.mlp", int(pool.latent_len)
    seen = Pooling(POOL, f"{POOL}.proj", f"{POOL}.proj_drop", _attend, apart=mlp, latents=latents)
    added = Branch(mlp, f"{mlp}.fc2", mlp, pre_norm(f"{POOL}.norm", mlp))
    return [
        Layer(seen, partial(_attention_part, pool), site_of(pool, POOL, latents)),
        Layer(added, partial(mlp_part, pool.mlp, mlp)),
    ]


def _attention_part(pool: NarrowLatentPool) -> Part:
    heads, head_dim, width = int(pool.num_heads), int(pool.head_dim), linear(pool, "kv").in_features
    wide = heads * head_dim
    groups, reasons = [UnitGroup(POOL, "attn_in", width, (Span(f"{POOL}.kv", 1, 0, width),), sliceable=False)], []
    why = normed_heads(pool) if isinstance(pool.q, nn.Linear) else "queries that are stored as they are"
    if why is None:
        places = (("q", 0, 0, "query"), ("kv", 0, 0, "key"), ("kv", 0, wide, "value"), ("proj", 1, 0, "output"))
        spans = tuple(Span(f"{POOL}.{name}", axis, offset, head_dim, role) for name, axis, offset, role in places)
        groups.append(head_dim_group(pool, POOL, spans))
    else:
        reasons.append(f"head dims of the attention pool are left alone because of {why}{INSTEAD}")
    groups.append(UnitGroup(POOL, "attn_out", wide, (Span(f"{POOL}.proj", 1, 0, wide),), sliceable=False))
    return Part(groups, attention_linears(pool, POOL, ("q", "kv", "proj")), reasons)
