"""timm's Swin Transformer, V1 and V2: stages of a shrinking grid, with attention in windows that shift from block to block.

Liu et al. 2021, arXiv 2103.14030, and 2022, arXiv 2111.09883; S3 (AutoFormerV2), arXiv 2111.14725.
Legend: B images, H×W grid of the stage, D its width, n tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise

import torch
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional

from toolchain.families.base import AttentionSite, Block, Branch, Factorizable, Family, UnitGroup, pre_norm
from toolchain.families.blocks import (
    INSTEAD,
    fused_part,
    linear,
    mlp_groups,
    refused_mlp,
)
from toolchain.families.pooling import refused_output

LINEARS = {"attn.qkv": False, "attn.proj": True, "mlp.fc1": False, "mlp.fc2": True}
"""Those of a block, and whether they end a branch."""


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


def swin_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, block), in forward order."""
    for index, stage in model.get_submodule("layers").named_children():
        for name, block in stage.get_submodule("blocks").named_children():
            yield f"layers.{index}.blocks.{name}", block


class SwinFamily(Family):
    """Units: mlp_hidden and head_dim are sliced; attn_in, attn_out and mlp_in are only zeroed. Patch merging stays whole.

    The bias table is added to the logits after the scale, so queries and keys reduce as without it. Zeros that fill up a
    window are tokens like others to the attention; nothing reads what it gives for them.
    """

    name = "swin"
    timm_modules = ("swin_transformer",)
    model_type: type[nn.Module] = SwinTransformer
    block_type: type[nn.Module] = SwinTransformerBlock
    attention_type: type[nn.Module] = swin_transformer.WindowAttention
    fixed_head_dim = ""
    """Why head dims cannot shrink; "" where they can."""

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, self.model_type)

    def refuses(self, model: nn.Module) -> str | None:
        every = list(swin_blocks(model))
        if not every:
            return "the model has no blocks"
        for path, block in every:
            parts = ((path, block, self.block_type), (f"{path}.attn", block.attn, self.attention_type))
            for where, part, wanted in parts:
                if type(part) is not wanted:
                    return f"{where} is a {type(part).__name__}; only timm's {wanted.__name__} is supported"
            if (why := refused_mlp(block.get_submodule("mlp"), f"{path}.mlp")) is not None:
                return why
        return refused_output(model)

    def adapt(self, model: nn.Module) -> None:
        """Gives every WindowAttention the attribute `head_dim` that timm's other attentions have."""
        for _, block in swin_blocks(model):
            if type(block.attn) is self.attention_type:
                heads = int(block.attn.num_heads)  # type: ignore[arg-type]
                block.attn.head_dim = linear(block.attn, "proj").in_features // heads  # type: ignore[assignment]

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        patches = model.get_submodule("patch_embed")
        height, width = patches.img_size  # type: ignore[misc]
        return int(patches.proj.in_channels), int(height), int(width)  # type: ignore[union-attr, arg-type]

    def patch_size(self, model: nn.Module) -> tuple[int, int] | None:
        rows, columns = model.get_submodule("patch_embed").patch_size  # type: ignore[misc]
        return int(rows), int(columns)

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = swin_transformer.checkpoint_filter_fn(dict(state), model)
        return converted

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        groups: list[UnitGroup] = []
        for path, block in swin_blocks(model):
            every = fused_part(block.get_submodule("attn"), f"{path}.attn").groups
            groups += [group for group in every if group.unit != "head_dim" or not self.fixed_head_dim]
            groups += mlp_groups(block.get_submodule("mlp"), f"{path}.mlp")
        return groups

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        return [
            Factorizable(f"{path}.{name}", "attention" if name.startswith("attn") else "mlp", ends)
            for path, _ in swin_blocks(model)
            for name, ends in LINEARS.items()
        ]

    def blocks(self, model: nn.Module) -> list[Block]:
        paths = [path for path, _ in swin_blocks(model)]
        blocks = [Block(paths[0], self.block_branches(paths[0]))]
        for before, path in pairwise(paths):
            merging = path.rpartition(".blocks.")[0] + ".downsample"
            same = merging == before.rpartition(".blocks.")[0] + ".downsample"
            blocks.append(Block(path, self.block_branches(path), None if same else partial(merge, path=merging)))
        return blocks

    def block_branches(self, path: str) -> tuple[Branch, ...]:
        """The branches of one block."""
        return (
            Branch(
                f"{path}.attn",
                f"{path}.attn.proj",
                f"{path}.drop_path1",
                partial(attention, block=path, norm=f"{path}.norm1"),
                arrange=partial(windows, block=path),
            ),
            Branch(f"{path}.mlp", f"{path}.mlp.fc2", f"{path}.drop_path2", pre_norm(f"{path}.norm2", f"{path}.mlp")),
        )

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        outputs: Tensor = model.forward_head(model.get_submodule("norm")(x))  # type: ignore[operator]
        return outputs

    def classifier(self, model: nn.Module) -> str | None:
        return "head.fc" if isinstance(model.get_submodule("head.fc"), nn.Linear) else None

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        return [
            AttentionSite(f"{path}.attn", int(block.attn.num_heads), int(block.attn.head_dim))  # type: ignore[union-attr, arg-type]
            for path, block in swin_blocks(model)
        ]

    def restrictions(self, model: nn.Module) -> list[str]:  # noqa: ARG002
        return [f"head dims are left alone because of {self.fixed_head_dim}{INSTEAD}"] if self.fixed_head_dim else []


class SwinV2Family(SwinFamily):
    """Units: mlp_hidden is sliced; attn_in, attn_out and mlp_in are only zeroed; head dims stay.

    Logits are cosines of queries and keys: only a rotation that both share, and that keeps every length, leaves them as
    they are. A norm stands between each branch and the stream.
    """

    name = "swin-v2"
    timm_modules = ("swin_transformer_v2",)
    model_type, block_type = SwinTransformerV2, SwinTransformerV2Block
    attention_type = swin_transformer_v2.WindowAttention
    fixed_head_dim = "cosine attention"

    def adapt(self, model: nn.Module) -> None:
        """Its attention reads the weight of qkv past the module, unless the bias is added separately."""
        super().adapt(model)
        for _, block in swin_blocks(model):
            if type(block.attn) is self.attention_type:
                block.attn.qkv_bias_separate = True

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = swin_transformer_v2.checkpoint_filter_fn(dict(state), model)
        return converted

    def block_branches(self, path: str) -> tuple[Branch, ...]:
        return (
            Branch(
                f"{path}.attn",
                f"{path}.attn.proj",
                f"{path}.drop_path1",
                partial(attention, block=path, norm=None),
                arrange=partial(windows, block=path),
                norm=f"{path}.norm1",
            ),
            Branch(
                f"{path}.mlp",
                f"{path}.mlp.fc2",
                f"{path}.drop_path2",
                pre_norm(None, f"{path}.mlp"),
                norm=f"{path}.norm2",
            ),
        )


SWIN, SWIN_V2 = SwinFamily(), SwinV2Family()
