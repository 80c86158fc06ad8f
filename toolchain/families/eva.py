"""timm's Eva: blocks whose positions are rotations of queries and keys (EVA-02, DINOv3, RoPE-ViT, PE), or EVA without.

RoFormer, Su et al. 2021, arXiv 2104.09864; EVA-02, Fang et al. 2023, arXiv 2303.11331; DINOv3, arXiv 2508.10104;
Perception Encoder, Bolya et al. 2025, arXiv 2504.13181.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.blocks import Context, Layer, blocks, linear, plain_layers, rigid_part
from toolchain.families.stacked import StackedFamily

LINEARS = ("qkv", "q_proj", "k_proj", "v_proj", "proj")


def eva_layers(block: nn.Module, path: str, context: Context, *, rotary: bool) -> list[Layer]:
    """The two branches of a block of timm's Eva, with the norms before or after.

    Args:
        block, path: the block.
        context: what gives its attention the rotation.
        rotary: whether there is one.
    """
    why = "rotary position embeddings" if rotary else "the fixed width of timm's EvaAttention"
    part = partial(rigid_part, why=why, names=LINEARS)
    return plain_layers(block, path, context, post=isinstance(block, EvaBlockPostNorm), part=part)


def separate_biases(model: nn.Module) -> None:
    """EvaAttention with a fused, biased qkv reads its weight past the module, unless the bias is added separately.

    Older timm does not say how wide its heads are.
    """
    for _, block in blocks(model):
        attention = getattr(block, "attn", None)
        if isinstance(attention, EvaAttention):
            attention.qkv_bias_separate = True
            if not hasattr(attention, "head_dim"):
                attention.head_dim = linear(attention, "proj").in_features // attention.num_heads


class EvaFamily(StackedFamily):
    """Units: mlp_hidden is sliced; attn_in, attn_out and mlp_in are only zeroed; head dims stay.

    A rotation acts on fixed pairs of head dims of q and k, in every head and, but for RoPE-Mixed, in every block the same: none
    can be rotated into others, and none can go. Attention shrinks by low rank in the linears around it.
    """

    name = "eva"
    timm_modules = ("eva",)
    model_type, attention_types = Eva, (EvaAttention, AttentionRope)
    block_types, block_words = (EvaBlock, EvaBlockPostNorm), "EvaBlock and EvaBlockPostNorm are"
    attention_words = "EvaAttention and AttentionRope are"

    def adapt(self, model: nn.Module) -> None:
        super().adapt(model)
        separate_biases(model)

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = checkpoint_filter_fn(dict(state), model)
        return converted

    def layers(self, model: nn.Module, block: nn.Module, path: str, index: int) -> list[Layer]:
        return eva_layers(block, path, partial(self.rotation, index=index), rotary=model.rope is not None)

    def rotation(self, model: nn.Module, index: int) -> Mapping[str, Tensor]:
        """The position embedding that attention of one block is given, made as `Eva` makes it; {} without one."""
        rope: Any = getattr(model, "rope", None)
        if rope is None:
            return {}
        patches: Any = model.get_submodule("patch_embed")
        fixed = hasattr(rope, "feat_shape") and not model.dynamic_img_size
        grid = None if fixed else patches.dynamic_feat_size(self.input_size(model)[1:])
        embedding: Tensor = rope.get_embed() if grid is None else rope.get_embed(shape=grid)
        return {"rope": embedding[index] if getattr(model, "rope_mixed", False) else embedding}


EVA = EvaFamily()
