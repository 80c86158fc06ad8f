"""timm's VisionTransformer, DeiT and the hybrids with a convolutional stem: every block that timm builds them of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from timm.layers.attention import Attention
from timm.layers.diff_attention import DiffAttention
from timm.layers.hybrid_embed import HybridEmbed
from timm.models.vision_transformer import Block as VitBlock
from timm.models.vision_transformer import (
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
    checkpoint_filter_fn,
)
from timm.models.vision_transformer_hybrid import checkpoint_filter_fn as hybrid_filter_fn
from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Branch, Factorizable, Parallel, Span, UnitGroup, pre_norm
from toolchain.families.blocks import (
    INSTEAD,
    Layer,
    Part,
    fused_part,
    head_dim_group,
    linear,
    mlp_part,
    normed_heads,
    plain_layers,
    rigid_part,
    scale_of,
    site_of,
)
from toolchain.families.narrow import NarrowDiffParallelBlock, NarrowParallel, NarrowParallelBlock, narrow_state
from toolchain.families.stacked import StackedFamily

DIFFERENCE = "the norm of differential attention"


def attention_part(attention: nn.Module, path: str) -> Part:
    """What plain or differential attention declares."""
    if isinstance(attention, DiffAttention):
        return rigid_part(attention, path, DIFFERENCE, ("qkv", "proj"))
    return fused_part(attention, path)


def attention_site(attention: nn.Module, path: str) -> AttentionSite:
    """Where attention is the difference of two, with queries and keys half as wide, it costs what one of values' width costs.

    Files take the difference first. timm's fused path, which none of them is made from, multiplies both by the values.
    """
    site = site_of(attention, path)
    different = isinstance(attention, DiffAttention | NarrowDiffParallelBlock)
    return replace(site, head_dim=2 * site.head_dim) if different else site


class VitFamily(StackedFamily):
    """Units: mlp_hidden and head_dim are sliced; attn_in, attn_out and mlp_in (VTP's other gates) are only zeroed.

    attn_in and mlp_in are positions of the residual stream as one branch reads it, attn_out is what proj reads.
    Removing them physically would need a gather on the residual stream, or head dims that differ between q, k and v.
    """

    name = "vit"
    timm_modules: Sequence[str] = ("vision_transformer", "deit", "vision_transformer_hybrid")
    model_type: type[nn.Module] = VisionTransformer
    block_types: tuple[type[nn.Module], ...] = (
        VitBlock,
        ResPostBlock,
        ParallelThingsBlock,
        NarrowParallelBlock,
        NarrowDiffParallelBlock,
    )
    block_words = "timm's own blocks are"
    attention_types: tuple[type[nn.Module], ...] = (Attention, DiffAttention)
    attention_words = "plain and differential self-attention are"

    def patch_size(self, model: nn.Module) -> tuple[int, int] | None:
        return None if isinstance(model.get_submodule("patch_embed"), HybridEmbed) else super().patch_size(model)

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        known: VisionTransformer = model  # type: ignore[assignment]  # what `matches` lets through
        if isinstance(model.get_submodule("patch_embed"), HybridEmbed):
            state = hybrid_filter_fn(dict(state), known)
        else:
            state = checkpoint_filter_fn(dict(state), known, adapt_layer_scale=True)
        return narrow_state(state, model)

    def layers(self, model: nn.Module, block: nn.Module, path: str, index: int) -> list[Layer]:  # noqa: ARG002
        if isinstance(block, NarrowParallel):
            return [one_parallel(block, path)]
        if isinstance(block, ParallelThingsBlock):
            return parallel_things(block, path)
        post = isinstance(block, ResPostBlock)
        return plain_layers(block, path, post=post, part=attention_part, site=attention_site)

    def classifier(self, model: nn.Module) -> str | None:
        return None if hasattr(model, "head_dist") else super().classifier(model)

    def read_tokens(self, model: nn.Module) -> int | None:
        read = super().read_tokens(model)
        return 2 if read is not None and hasattr(model, "dist_token") else read


def parallel_things(block: nn.Module, path: str) -> list[Layer]:
    """Several attentions that read the same stream, then several MLPs: Touvron et al. 2022, arXiv 2203.09795."""
    layers: list[Layer] = []
    for group, name, last, part in (("attns", "attn", "proj", attention_part), ("ffns", "mlp", "fc2", mlp_part)):
        beside = list(block.get_submodule(group).children())
        for index, each in enumerate(beside):
            at = f"{path}.{group}.{index}"
            module, first = f"{at}.{name}", index == 0
            branch = Parallel(
                module,
                f"{module}.{last}",
                f"{at}.drop_path",
                pre_norm(f"{at}.norm", module),
                scale_of(each, at, "ls"),
                first=first,
                last=index == len(beside) - 1,
            )
            inner = each.get_submodule(name)
            site = attention_site(inner, module) if name == "attn" else None
            layers.append(Layer(branch, partial(part, inner, module), site))
    return layers


def one_parallel(block: NarrowParallel, path: str) -> Layer:
    """Attention and MLP as one branch, between one linear and another: Dehghani et al. 2023, arXiv 2302.05442."""
    branch = Branch(
        path,
        f"{path}.out_proj",
        f"{path}.drop_path",
        lambda model, x: model.get_submodule(path).added(x),  # type: ignore[operator]
        scale_of(block, path, "ls"),
    )
    return Layer(branch, partial(_parallel_part, block, path), attention_site(block, path))


def _parallel_part(block: NarrowParallel, path: str) -> Part:
    first, last = f"{path}.in_proj", f"{path}.out_proj"
    different, site = isinstance(block, NarrowDiffParallelBlock), attention_site(block, path)
    head_dim = site.head_dim
    width, wide = linear(block, "in_proj").in_features, site.heads * head_dim
    hidden = linear(block, "out_proj").in_features - wide
    groups = [UnitGroup(path, "attn_in", width, (Span(first, 1, 0, width),), sliceable=False)]
    reasons = []
    if (why := DIFFERENCE if different else normed_heads(block)) is None:
        rows = zip(("query", "key", "value"), range(hidden, hidden + 3 * wide, wide), strict=True)
        spans = [Span(first, 0, offset, head_dim, role) for role, offset in rows]
        groups.append(head_dim_group(block, path, (*spans, Span(last, 1, 0, head_dim, "output"))))
    else:
        reasons.append(f"head dims are left alone because of {why}{INSTEAD}")
    neurons = (Span(first, 0, 0, hidden), Span(last, 1, wide, hidden))
    groups += [
        UnitGroup(path, "attn_out", wide, (Span(last, 1, 0, wide),), sliceable=False),
        UnitGroup(path, "mlp_hidden", hidden, neurons),
    ]
    linears = [Factorizable(first, "attention"), Factorizable(last, "attention", ends_branch=True)]
    return Part(groups, linears, reasons)


VIT = VitFamily()
