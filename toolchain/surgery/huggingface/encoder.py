"""What ViT, DeiT, BEiT and DINOv2 of transformers have in common: the names of BERT's encoder around patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from toolchain.surgery.huggingface.layout import ACTIVATIONS, Design, Layout, VitConfig, vit_kwargs
from toolchain.surgery.huggingface.names import MASKED, Left, Rules

POOLER = Left("features are the class token after the last norm, without the linear and tanh of transformers' pooler")
PLAIN = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
"""The constant in a norm → a plain VisionTransformer of timm that has it."""


def encoder_rules(prefix: str, *more: tuple[str, str | Left]) -> Rules:
    """Names of an encoder, alone or under a prefix.

    Args:
        prefix: what stands before every name where the model has a classifier.
        more: rules that come first, for names without the prefix.
    """
    own, layer = rf"(?:{prefix}\.)?", rf"(?:{prefix}\.)?encoder\.layer\.(\d+)\."
    return (
        *((own + pattern, new) for pattern, new in more),
        (own + r"embeddings\.cls_token", "cls_token"),
        (own + r"embeddings\.mask_token", MASKED),
        (own + r"embeddings\.position_embeddings", "pos_embed"),
        (own + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (layer + r"attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
        (layer + r"attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (layer + r"intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (layer + r"output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (layer + r"(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
        (layer + r"(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
        (own + r"layernorm\.(\w+)", r"norm.\1"),
        (own + r"pooler\.dense\.\w+", POOLER),
        (r"classifier\.(\w+)", r"head.\1"),
        (r"decoder\..*", MASKED),
    )


def vit_design(
    layout: Layout[Any],
    config: VitConfig,
    changes: Mapping[str, object] = MappingProxyType({}),
    *,
    names: Mapping[float, str] = PLAIN,
    notes: tuple[str, ...] = (),
) -> Design:
    """The VisionTransformer with a config's sizes, norms and activation.

    Args:
        layout: what raises if timm has no such model.
        config: of the model.
        changes: keyword arguments beside those that the config gives.
        names: the constant in a norm → an architecture that has it.
        notes: sentences beside that on the constant.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise layout.refusal(f"its activation {config.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
    eps = min(names, key=lambda eps: abs(math.log(eps / config.layer_norm_eps)))
    kwargs = vit_kwargs(config) | {"qkv_bias": config.qkv_bias, "act_layer": ACTIVATIONS[config.hidden_act]}
    notes = (*layout.norm_notes(config.layer_norm_eps, eps), *notes)
    return Design(names[eps], kwargs | {"pre_norm": False} | dict(changes), notes)
