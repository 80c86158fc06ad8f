"""timm's NaFlexVit at one image size: that of its grid of positions.

NaViT, Dehghani et al. 2023, arXiv 2307.06304; FlexiViT, Beyer et al. 2023, arXiv 2212.08013.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock
from timm.models.naflexvit import NaFlexVit, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.blocks import Layer
from toolchain.families.eva import eva_layers, separate_biases
from toolchain.families.narrow import narrow_state
from toolchain.families.vit import VitFamily


class NaFlexFamily(VitFamily):
    """Units: as of the blocks that it is built of, those of timm's VisionTransformer or of its Eva.

    A NaFlexVit takes images of any size; what is compressed and exported takes one: `model.kwargs.pos_embed_grid_size` times
    the patch size, or `model.kwargs.img_size` where there is no such grid.
    """

    name = "naflex"
    timm_modules = ("naflexvit",)
    model_type = NaFlexVit
    block_types = (*VitFamily.block_types, EvaBlock)
    attention_types = (*VitFamily.attention_types, EvaAttention, AttentionRope)
    attention_words = "attention of timm's VisionTransformer and Eva is"

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        separate_biases(model)

    def built_for(self, model: nn.Module) -> tuple[int, int, int]:
        embeds: Any = model.get_submodule("embeds")
        size, grid = embeds.default_img_size, embeds.pos_embed_grid_size
        if size is None and grid is not None:
            size = tuple(count * step for count, step in zip(grid, embeds.patch_size, strict=True))
        height, width = size or model.pretrained_cfg["input_size"][1:]  # type: ignore[index]
        return int(embeds.in_chans), int(height), int(width)

    def patch_size(self, model: nn.Module) -> tuple[int, int] | None:
        embeds = model.get_submodule("embeds")
        rows, columns = embeds.patch_size  # type: ignore[misc]
        return None if embeds.dynamic_img_pad else (int(rows), int(columns))

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        known: NaFlexVit = model  # type: ignore[assignment]  # what `matches` lets through
        return narrow_state(checkpoint_filter_fn(dict(state), known), model)

    def layers(self, model: nn.Module, block: nn.Module, path: str, index: int) -> list[Layer]:
        if isinstance(block, EvaBlock):
            return eva_layers(block, path, partial(self.rotation, index=index), rotary=model.rope is not None)
        return super().layers(model, block, path, index)

    def rotation(self, model: nn.Module, index: int) -> Mapping[str, Tensor]:
        """The position embedding that attention of one block is given, made as `NaFlexVit` makes it; {} without one."""
        rope = getattr(model, "rope", None)
        if rope is None:
            return {}
        size = self.input_size(model)[1:]
        embeds: Any = model.get_submodule("embeds")
        embedding: Tensor = rope.get_embed(shape=embeds.dynamic_feat_size(size))
        return {"rope": embedding[index] if model.rope_is_mixed else embedding}


NAFLEX = NaFlexFamily()
