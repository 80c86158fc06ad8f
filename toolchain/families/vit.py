"""timm's VisionTransformer and DeiT: plain pre-norm blocks with fused qkv."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.models.vision_transformer import Block as VitBlock
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.base import Branch, Span, UnitGroup, pre_norm
from toolchain.families.blocks import INSTEAD, PreNormFamily, is_identity, linear


class VitFamily(PreNormFamily):
    """Units: mlp_hidden and head_dim are sliced; attn_in, attn_out and mlp_in (VTP's other gates) are only zeroed.

    attn_in and mlp_in are positions of the residual stream as one branch reads it, attn_out is what proj reads.
    Removing them physically would need a gather on the residual stream, or head dims that differ between q, k and v.
    """

    name = "vit"
    timm_modules = ("vision_transformer", "deit")
    model_type, block_type, attention_types = VisionTransformer, VitBlock, (Attention,)
    block_words, attention_words = "the plain pre-norm Block", "plain self-attention is"
    linears = ("qkv", "proj")

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = checkpoint_filter_fn(
            dict(state),
            model,  # type: ignore[arg-type]  # what `matches` lets through
            adapt_layer_scale=True,
        )
        return converted

    def attention_groups(self, attention: nn.Module, path: str) -> list[UnitGroup]:
        heads, head_dim = int(attention.num_heads), int(attention.head_dim)  # type: ignore[arg-type]
        wide, width = heads * head_dim, linear(attention, "qkv").in_features
        readers = [Span(f"{path}.qkv", 1, 0, width)]
        query, *others = (
            Span(f"{path}.qkv", 0, index * wide, head_dim, role) for index, role in enumerate(("query", "key", "value"))
        )
        if gated := _is_gated(attention):
            readers.append(Span(f"{path}.gate", 1, 0, width))
            others.append(Span(f"{path}.gate", 0, 0, head_dim))
        spans = (query, *others, Span(f"{path}.proj", 1, 0, head_dim, "output"))
        groups = [UnitGroup(path, "attn_in", width, tuple(readers), sliceable=False)]
        if _fixed_head_dim(attention) is None:
            attrs: Mapping[str, Callable[[int], float]] = {
                "head_dim": lambda kept: kept,
                "attn_dim": lambda kept: heads * kept,
                "scale": lambda kept: kept**-0.5,
            }
            how = {"attrs": attrs, "rescale_on_slice": (query,), "mixable": not gated}
            groups.append(UnitGroup(path, "head_dim", head_dim, spans, heads, **how))  # type: ignore[arg-type]
        groups.append(UnitGroup(path, "attn_out", wide, (Span(f"{path}.proj", 1, 0, wide),), sliceable=False))
        return groups

    def block_branches(self, block: nn.Module, path: str, index: int) -> tuple[Branch, ...]:  # noqa: ARG002
        def branch(number: int, part: str, last: str) -> Branch:
            module = f"{path}.{part}"
            scaled = isinstance(block.get_submodule(f"ls{number}"), LayerScale)
            scale = f"{path}.ls{number}.gamma" if scaled else None
            compute = pre_norm(f"{path}.norm{number}", module)
            return Branch(module, f"{module}.{last}", f"{path}.drop_path{number}", compute, scale)

        return branch(1, "attn", "proj"), branch(2, "mlp", "fc2")

    def classifier(self, model: nn.Module) -> str | None:
        return None if hasattr(model, "head_dist") else super().classifier(model)

    def read_tokens(self, model: nn.Module) -> int | None:
        read = super().read_tokens(model)
        return 2 if read is not None and hasattr(model, "dist_token") else read

    def attention_restrictions(self, model: nn.Module, attention: nn.Module) -> list[str]:  # noqa: ARG002
        reasons = []
        if (why := _fixed_head_dim(attention)) is not None:
            reasons.append(f"head dims are left alone because of {why}{INSTEAD}")
        if _is_gated(attention):
            reasons.append(f"head dims are not factorised jointly because of a gate on the attention output{INSTEAD}")
        return reasons


def _is_gated(attention: nn.Module) -> bool:
    return getattr(attention, "gate", None) is not None


def _fixed_head_dim(attention: nn.Module) -> str | None:
    """Why head dims cannot shrink, or None."""
    if not (is_identity(attention, "q_norm") and is_identity(attention, "k_norm")):
        return "a norm over the head dim of q and k"
    return None if is_identity(attention, "norm") else "a norm over the attention output"


VIT = VitFamily()
