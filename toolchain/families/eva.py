"""timm's Eva: pre-norm blocks whose positions are rotations of queries and keys (EVA-02, DINOv3, RoPE-ViT), or EVA without.

RoFormer, Su et al. 2021, arXiv 2104.09864; EVA-02, Fang et al. 2023, arXiv 2303.11331; DINOv3, arXiv 2508.10104.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Branch, Factorizable, Span, UnitGroup
from toolchain.families.blocks import (
    INSTEAD,
    blocks,
    factorizable,
    image_size,
    linear,
    mlp_groups,
    mlp_limit,
    refused_mlp,
    refused_output,
)

READERS = ("qkv", "q_proj", "k_proj", "v_proj")
"""What reads the residual stream in attention: one linear, or three."""


def _present(attention: nn.Module, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(attention, name, None) is not None]


def _rotation(index: int) -> Callable[[nn.Module], Mapping[str, Tensor]]:
    """A model → the position embedding that attention of one block is given, made as `Eva.forward` makes it."""

    def context(model: nn.Module) -> Mapping[str, Tensor]:
        rope = getattr(model, "rope", None)
        if rope is None:
            return {}
        fixed = hasattr(rope, "feat_shape") and not model.dynamic_img_size
        grid = None if fixed else model.get_submodule("patch_embed").grid_size
        embedding: Tensor = rope.get_embed() if grid is None else rope.get_embed(shape=grid)
        return {"rope": embedding[index] if getattr(model, "rope_mixed", False) else embedding}

    return context


class EvaFamily:
    """Units: mlp_hidden is sliced; attn_in, attn_out and mlp_in are only zeroed; head dims stay.

    A rotation acts on fixed pairs of head dims of q and k, in every head and, but for RoPE-Mixed, in every block the same: none
    can be rotated into others, and none can go. Attention shrinks by low rank in the linears around it.
    """

    name = "eva"
    timm_modules: Sequence[str] = ("eva",)

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def refuses(self, model: nn.Module) -> str | None:
        if not self.matches(model):
            return f"{type(model).__name__} is not a timm Eva"
        found = list(blocks(model))
        if not found:
            return "the model has no blocks"
        for path, block in found:
            if type(block) is not EvaBlock:
                return f"{path} is a {type(block).__name__}; only the pre-norm EvaBlock is supported"
            if type(block.attn) not in (EvaAttention, AttentionRope):
                return (
                    f"{path}.attn is a {type(block.attn).__name__}; only EvaAttention and AttentionRope are supported"
                )
            if (why := refused_mlp(block.get_submodule("mlp"), f"{path}.mlp")) is not None:
                return why
        return refused_output(model)

    def adapt(self, model: nn.Module) -> None:
        """EvaAttention with a fused, biased qkv reads its weight past the module, unless the bias is added separately."""
        for _, block in blocks(model):
            if isinstance(block.attn, EvaAttention):
                block.attn.qkv_bias_separate = True

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        return image_size(model)

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = checkpoint_filter_fn(dict(state), model)
        return converted

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        groups: list[UnitGroup] = []
        for path, block in blocks(model):
            attention, at = block.get_submodule("attn"), f"{path}.attn"
            readers = _present(attention, (*READERS, "gate"))
            width, wide = linear(attention, readers[0]).in_features, linear(attention, "proj").in_features
            spans = tuple(Span(f"{at}.{name}", 1, 0, width) for name in readers)
            groups.append(UnitGroup(at, "attn_in", width, spans, sliceable=False))
            groups.append(UnitGroup(at, "attn_out", wide, (Span(f"{at}.proj", 1, 0, wide),), sliceable=False))
            groups += mlp_groups(block.get_submodule("mlp"), f"{path}.mlp")
        return groups

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        found: list[Factorizable] = []
        for path, block in blocks(model):
            names = _present(block.get_submodule("attn"), (*READERS, "proj"))
            found += [Factorizable(f"{path}.attn.{name}", "attention", name == "proj") for name in names]
            found += factorizable(block.get_submodule("mlp"), f"{path}.mlp", "mlp", "fc2")
        return found

    def branches(self, model: nn.Module) -> dict[str, tuple[Branch, ...]]:
        return {path: self._branches(block, path, index) for index, (path, block) in enumerate(blocks(model))}

    @staticmethod
    def _branches(block: nn.Module, path: str, index: int) -> tuple[Branch, Branch]:
        def scale(name: str) -> str | None:
            return f"{path}.{name}" if getattr(block, name, None) is not None else None

        attention = (f"{path}.norm1", f"{path}.attn", f"{path}.attn.proj", f"{path}.drop_path1", scale("gamma_1"))
        mlp = (f"{path}.norm2", f"{path}.mlp", f"{path}.mlp.fc2", f"{path}.drop_path2", scale("gamma_2"))
        return Branch(*attention, context=_rotation(index)), Branch(*mlp)

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = model.forward_head(model.get_submodule("norm")(x))  # type: ignore[operator]
        return logits

    def classifier(self, model: nn.Module) -> str | None:
        return "head" if isinstance(model.get_submodule("head"), nn.Linear) else None

    def read_tokens(self, model: nn.Module) -> int | None:
        return 1 if model.global_pool == "token" else None

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        return [
            AttentionSite(f"{path}.attn", int(block.attn.num_heads), int(block.attn.head_dim))  # type: ignore[union-attr, arg-type]
            for path, block in blocks(model)
        ]

    def limits(self, model: nn.Module) -> list[str]:
        positions = "rotary position embeddings" if model.rope is not None else "the fixed width of timm's EvaAttention"
        reasons = {f"head dims are left alone because of {positions}{INSTEAD}": None}
        for _, block in blocks(model):
            if (why := mlp_limit(block.get_submodule("mlp"))) is not None:
                reasons[f"feed-forward neurons are left alone because of {why}"] = None
        return list(reasons)
