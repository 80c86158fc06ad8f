"""timm's VisionTransformer and DeiT: plain pre-norm blocks with fused qkv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from timm.layers.attention import Attention
from timm.layers.layer_scale import LayerScale
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Branch, Factorizable, Span, UnitGroup
from toolchain.families.blocks import (
    INSTEAD,
    blocks,
    factorizable,
    image_size,
    is_identity,
    linear,
    mlp_groups,
    mlp_limit,
    refused_mlp,
    refused_output,
)


class VitFamily:
    """Units: mlp_hidden and head_dim are sliced; attn_in, attn_out and mlp_in (VTP's other gates) are only zeroed.

    attn_in and mlp_in are positions of the residual stream as one branch reads it, attn_out is what proj reads.
    Removing them physically would need a gather on the residual stream, or head dims that differ between q, k and v.
    """

    name = "vit"
    timm_modules: Sequence[str] = ("vision_transformer", "deit")

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def refuses(self, model: nn.Module) -> str | None:
        if not self.matches(model):
            return f"{type(model).__name__} is not a timm VisionTransformer"
        found = list(blocks(model))
        if not found:
            return "the model has no blocks"
        for path, block in found:
            if type(block) is not Block:
                return f"{path} is a {type(block).__name__}; only the plain pre-norm Block is supported"
            if type(block.attn) is not Attention:
                return f"{path}.attn is a {type(block.attn).__name__}; only plain self-attention is supported"
            if (why := refused_mlp(block.get_submodule("mlp"), f"{path}.mlp")) is not None:
                return why
        return refused_output(model)

    def adapt(self, model: nn.Module) -> None:
        """Timm's Attention calls all of its linears."""

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        return image_size(model)

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = checkpoint_filter_fn(
            dict(state),
            model,  # type: ignore[arg-type]  # what `matches` lets through
            adapt_layer_scale=True,
        )
        return converted

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        groups: list[UnitGroup] = []
        for path, block in blocks(model):
            groups += self._attention_groups(block.get_submodule("attn"), f"{path}.attn")
            groups += mlp_groups(block.get_submodule("mlp"), f"{path}.mlp")
        return groups

    def _attention_groups(self, attention: nn.Module, path: str) -> list[UnitGroup]:
        heads, head_dim = int(attention.num_heads), int(attention.head_dim)  # type: ignore[arg-type]
        wide = heads * head_dim
        width = linear(attention, "qkv").in_features
        readers = [Span(f"{path}.qkv", 1, 0, width)]
        query = Span(f"{path}.qkv", 0, 0, head_dim, "query")
        spans = [
            query,
            Span(f"{path}.qkv", 0, wide, head_dim, "key"),
            Span(f"{path}.qkv", 0, 2 * wide, head_dim, "value"),
        ]
        gated = getattr(attention, "gate", None) is not None
        if gated:
            readers.append(Span(f"{path}.gate", 1, 0, width))
            spans.append(Span(f"{path}.gate", 0, 0, head_dim))
        spans.append(Span(f"{path}.proj", 1, 0, head_dim, "output"))
        groups = [UnitGroup(path, "attn_in", width, tuple(readers), sliceable=False)]
        if self._head_dim_limit(attention) is None:
            attrs: Mapping[str, Callable[[int], float]] = {
                "head_dim": lambda kept: kept,
                "attn_dim": lambda kept: heads * kept,
                "scale": lambda kept: kept**-0.5,
            }
            groups.append(
                UnitGroup(
                    path,
                    "head_dim",
                    head_dim,
                    tuple(spans),
                    heads,
                    attrs=attrs,
                    rescale_on_slice=(query,),
                    mixable=not gated,
                )
            )
        groups.append(UnitGroup(path, "attn_out", wide, (Span(f"{path}.proj", 1, 0, wide),), sliceable=False))
        return groups

    @staticmethod
    def _head_dim_limit(attention: nn.Module) -> str | None:
        if not (is_identity(attention, "q_norm") and is_identity(attention, "k_norm")):
            return "a norm over the head dim of q and k"
        if not is_identity(attention, "norm"):
            return "a norm over the attention output"
        return None

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        found: list[Factorizable] = []
        for path, block in blocks(model):
            found += [Factorizable(f"{path}.attn.{name}", "attention", name == "proj") for name in ("qkv", "proj")]
            found += factorizable(block.get_submodule("mlp"), f"{path}.mlp", "mlp", "fc2")
        return found

    def branches(self, model: nn.Module) -> dict[str, tuple[Branch, ...]]:
        return {path: self._branches(block, path) for path, block in blocks(model)}

    @staticmethod
    def _branches(block: nn.Module, path: str) -> tuple[Branch, Branch]:
        def scale(name: str) -> str | None:
            return f"{path}.{name}.gamma" if isinstance(block.get_submodule(name), LayerScale) else None

        return (
            Branch(f"{path}.norm1", f"{path}.attn", f"{path}.attn.proj", f"{path}.drop_path1", scale("ls1")),
            Branch(f"{path}.norm2", f"{path}.mlp", f"{path}.mlp.fc2", f"{path}.drop_path2", scale("ls2")),
        )

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = model.forward_head(model.get_submodule("norm")(x))  # type: ignore[operator]
        return logits

    def classifier(self, model: nn.Module) -> str | None:
        single = isinstance(model.get_submodule("head"), nn.Linear) and not hasattr(model, "head_dist")
        return "head" if single else None

    def read_tokens(self, model: nn.Module) -> int | None:
        if model.global_pool != "token":
            return None
        return 2 if hasattr(model, "dist_token") else 1

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        return [
            AttentionSite(f"{path}.attn", int(block.attn.num_heads), int(block.attn.head_dim))  # type: ignore[union-attr, arg-type]
            for path, block in blocks(model)
        ]

    def limits(self, model: nn.Module) -> list[str]:
        reasons: dict[str, None] = {}
        for _, block in blocks(model):
            if (why := self._head_dim_limit(block.get_submodule("attn"))) is not None:
                reasons[f"head dims are left alone because of {why}{INSTEAD}"] = None
            if getattr(block.get_submodule("attn"), "gate", None) is not None:
                reasons[f"head dims are not factorised jointly because of a gate on the attention output{INSTEAD}"] = (
                    None
                )
            if (why := mlp_limit(block.get_submodule("mlp"))) is not None:
                reasons[f"feed-forward neurons are left alone because of {why}"] = None
        return list(reasons)
