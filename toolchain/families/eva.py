"""timm's Eva: pre-norm blocks whose positions are rotations of queries and keys (EVA-02, DINOv3, RoPE-ViT), or EVA without.

RoFormer, Su et al. 2021, arXiv 2104.09864; EVA-02, Fang et al. 2023, arXiv 2303.11331; DINOv3, arXiv 2508.10104.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.base import Branch, Span, UnitGroup, pre_norm
from toolchain.families.blocks import INSTEAD, PreNormFamily, blocks, linear, present


def rotation(model: nn.Module, index: int) -> Mapping[str, Tensor]:
    """The position embedding that attention of one block is given, made as `Eva.forward` makes it; {} without one."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return {}
    fixed = hasattr(rope, "feat_shape") and not model.dynamic_img_size
    grid = None if fixed else model.get_submodule("patch_embed").grid_size
    embedding: Tensor = rope.get_embed() if grid is None else rope.get_embed(shape=grid)
    return {"rope": embedding[index] if getattr(model, "rope_mixed", False) else embedding}


class EvaFamily(PreNormFamily):
    """Units: mlp_hidden is sliced; attn_in, attn_out and mlp_in are only zeroed; head dims stay.

    A rotation acts on fixed pairs of head dims of q and k, in every head and, but for RoPE-Mixed, in every block the same: none
    can be rotated into others, and none can go. Attention shrinks by low rank in the linears around it.
    """

    name = "eva"
    timm_modules = ("eva",)
    model_type, block_type, attention_types = Eva, EvaBlock, (EvaAttention, AttentionRope)
    block_words, attention_words = "the pre-norm EvaBlock", "EvaAttention and AttentionRope are"
    linears = ("qkv", "q_proj", "k_proj", "v_proj", "proj")

    def adapt(self, model: nn.Module) -> None:
        """EvaAttention with a fused, biased qkv reads its weight past the module, unless the bias is added separately."""
        for _, block in blocks(model):
            if isinstance(block.attn, EvaAttention):
                block.attn.qkv_bias_separate = True

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = checkpoint_filter_fn(dict(state), model)
        return converted

    def attention_groups(self, attention: nn.Module, path: str) -> list[UnitGroup]:
        readers = present(attention, (*self.linears[:-1], "gate"))
        width, wide = linear(attention, readers[0]).in_features, linear(attention, "proj").in_features
        spans = tuple(Span(f"{path}.{name}", 1, 0, width) for name in readers)
        return [
            UnitGroup(path, "attn_in", width, spans, sliceable=False),
            UnitGroup(path, "attn_out", wide, (Span(f"{path}.proj", 1, 0, wide),), sliceable=False),
        ]

    def block_branches(self, block: nn.Module, path: str, index: int) -> tuple[Branch, ...]:
        def branch(number: int, part: str, last: str, **context: partial[Mapping[str, Tensor]]) -> Branch:
            module, gamma = f"{path}.{part}", f"gamma_{number}"
            scale = f"{path}.{gamma}" if getattr(block, gamma, None) is not None else None
            compute = pre_norm(f"{path}.norm{number}", module, **context)
            return Branch(module, f"{module}.{last}", f"{path}.drop_path{number}", compute, scale)

        return branch(1, "attn", "proj", context=partial(rotation, index=index)), branch(2, "mlp", "fc2")

    def attention_restrictions(self, model: nn.Module, attention: nn.Module) -> list[str]:  # noqa: ARG002
        rotary = model.rope is not None
        positions = "rotary position embeddings" if rotary else "the fixed width of timm's EvaAttention"
        return [f"head dims are left alone because of {positions}{INSTEAD}"]


EVA = EvaFamily()
