"""timm's Swin Transformer, V1 and V2: stages of a shrinking grid, with attention in windows that shift from block to block.

Liu et al. 2021, arXiv 2103.14030, and 2022, arXiv 2111.09883; S3 (AutoFormerV2), arXiv 2111.14725.
Legend: B images, H×W grid of the stage, D its width, n tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional

from toolchain.families.base import Block
from toolchain.families.blocks import Layer, Part, fused_part, linear, plain_layers, rigid_part
from toolchain.families.stacked import StackedFamily


def windows(model: nn.Module, x: Tensor, block: str) -> Tensor:
    """[B, H, W, c] → [B·windows, n, c] as the attention of a block is given it: shifted, filled up with zeros, cut."""
    part = model.get_submodule(block)
    rows, columns = part.window_size  # type: ignore[misc]
    down, right = part.shift_size  # type: ignore[misc]
    x = torch.roll(x, (-down, -right), (1, 2))
    height, width = x.shape[1:3]
    x = functional.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    cut: Tensor = swin_transformer.window_partition(x, (rows, columns))
    return cut.flatten(1, 2)


def attention(model: nn.Module, x: Tensor, block: str, norm: str | None) -> Tensor:
    """What the windowed attention of a block gives for a stream [B, H, W, D], laid out as the stream."""
    y: Tensor = model.get_submodule(block)._attn(x if norm is None else model.get_submodule(norm)(x))  # type: ignore[operator]  # noqa: SLF001
    return y


def merge(model: nn.Module, x: Tensor, path: str) -> Tensor:
    """The stream of a stage after patch merging, [B, ⌈H/2⌉, ⌈W/2⌉, 2D]."""
    merged: Tensor = model.get_submodule(path)(x)
    return merged


class SwinFamily(StackedFamily):
    """Units: mlp_hidden and head_dim are sliced; attn_in, attn_out and mlp_in are only zeroed. Patch merging stays whole.

    The bias table is added to the logits after the scale, so queries and keys reduce as without it. Zeros that fill up a
    window are tokens like others to the attention; nothing reads what it gives for them.
    """

    name = "swin"
    timm_modules: Sequence[str] = ("swin_transformer",)
    model_type: type[nn.Module] = SwinTransformer
    block_types: tuple[type[nn.Module], ...] = (SwinTransformerBlock,)
    block_words = "timm's SwinTransformerBlock is"
    attention_types: tuple[type[nn.Module], ...] = (swin_transformer.WindowAttention,)
    attention_words = "timm's WindowAttention is"
    post = False
    """Whether norms come after attention and MLP."""

    def attention_part(self, part: nn.Module, path: str) -> Part:
        """What the attention of a block declares."""
        return fused_part(part, path)

    def layers(self, model: nn.Module, block: nn.Module, path: str, index: int) -> list[Layer]:  # noqa: ARG002
        attn, mlp = plain_layers(block, path, post=self.post, part=self.attention_part)
        compute = partial(attention, block=path, norm=None if self.post else f"{path}.norm1")
        return [replace(attn, branch=replace(attn.branch, compute=compute, arrange=partial(windows, block=path))), mlp]

    def every_block(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for index, stage in model.get_submodule("layers").named_children():
            for name, block in stage.get_submodule("blocks").named_children():
                yield f"layers.{index}.blocks.{name}", block

    def own_attentions(self, model: nn.Module) -> Iterator[Any]:
        """The attentions of its blocks that are timm's."""
        return (block.attn for _, block in self.every_block(model) if type(block.attn) in self.attention_types)

    def adapt(self, model: nn.Module) -> None:
        """Gives every WindowAttention the attribute `head_dim` that timm's other attentions have."""
        for attn in self.own_attentions(model):
            attn.head_dim = linear(attn, "proj").in_features // attn.num_heads

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = swin_transformer.checkpoint_filter_fn(dict(state), model)
        return converted

    def blocks(self, model: nn.Module) -> list[Block]:
        first, *others = super().blocks(model)
        joined = [first]
        for block in others:
            before, merging = (each.path.rpartition(".blocks.")[0] + ".downsample" for each in (joined[-1], block))
            joined.append(block if merging == before else replace(block, bridge=partial(merge, path=merging)))
        return joined

    def classifier(self, model: nn.Module) -> str | None:
        return "head.fc" if isinstance(getattr(model.get_submodule("head"), "fc", None), nn.Linear) else None


class SwinV2Family(SwinFamily):
    """Units: mlp_hidden is sliced; attn_in, attn_out and mlp_in are only zeroed; head dims stay.

    Logits are cosines of queries and keys: only a rotation that both share, and that keeps every length, leaves them as
    they are. A norm stands between each branch and the stream.
    """

    name = "swin-v2"
    timm_modules = ("swin_transformer_v2",)
    model_type, block_types = SwinTransformerV2, (SwinTransformerV2Block,)
    block_words = "timm's SwinTransformerV2Block is"
    attention_types = (swin_transformer_v2.WindowAttention,)
    post = True

    def attention_part(self, part: nn.Module, path: str) -> Part:
        return rigid_part(part, path, "cosine attention", ("qkv", "proj"))

    def adapt(self, model: nn.Module) -> None:
        """Its attention reads the weight of qkv past the module, unless the bias is added separately."""
        super().adapt(model)
        for attn in self.own_attentions(model):
            attn.qkv_bias_separate = True

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = swin_transformer_v2.checkpoint_filter_fn(dict(state), model)
        return converted


SWIN, SWIN_V2 = SwinFamily(), SwinV2Family()
