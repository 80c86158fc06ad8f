"""timm's VisionTransformer and DeiT: plain pre-norm blocks with fused qkv."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from timm.layers.attention import Attention
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Branch, Factorizable, Span, UnitGroup


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    blocks = model.get_submodule("blocks")
    return ((f"blocks.{name}", block) for name, block in blocks.named_children())


def _linear(module: nn.Module, path: str) -> nn.Linear:
    linear = module.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{path} is a {type(linear).__name__}, expected nn.Linear")
    return linear


def _is_identity(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None) or nn.Identity(), nn.Identity)


def _mlp_spans(mlp: nn.Module, path: str) -> tuple[int, tuple[Span, ...]]:
    """(hidden width M, the spans of a hidden neuron) for the three MLP layouts of timm.

    The first linear's outputs hold a neuron once (Mlp), or twice: side by side in one packed fc1 (GluMlp), or in two
    linears (SwiGLU). fc2 reads it once.
    """
    hidden = _linear(mlp, "fc2").in_features
    if isinstance(mlp, SwiGLU):
        first: tuple[Span, ...] = (Span(f"{path}.fc1_g", 0, 0, hidden), Span(f"{path}.fc1_x", 0, 0, hidden))
    elif isinstance(mlp, GluMlp):
        first = (Span(f"{path}.fc1", 0, 0, hidden), Span(f"{path}.fc1", 0, hidden, hidden))
    else:
        first = (Span(f"{path}.fc1", 0, 0, hidden),)
    return hidden, (*first, Span(f"{path}.fc2", 1, 0, hidden))


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
        if getattr(model, "attn_pool", None) is not None:
            return "attention pooling (global_pool 'map' or 'prr') is not supported"
        blocks = list(_blocks(model))
        if not blocks:
            return "the model has no blocks"
        for path, block in blocks:
            if type(block) is not Block:
                return f"{path} is a {type(block).__name__}; only the plain pre-norm Block is supported"
            attention, mlp = block.attn, block.mlp
            if type(attention) is not Attention:
                return f"{path}.attn is a {type(attention).__name__}; only plain self-attention is supported"
            if type(mlp) not in (Mlp, GluMlp, SwiGLU) or not isinstance(mlp.fc2, nn.Linear):
                return f"{path}.mlp is a {type(mlp).__name__}; only Mlp, GluMlp and SwiGLU of linears are supported"
        if model.global_pool == "":
            return (
                "it gives a row of logits per token (global_pool ''); set model.kwargs.global_pool to 'token' or 'avg'"
            )
        if not model.num_classes or isinstance(model.get_submodule("head"), nn.Identity):
            return "it has no classifier (num_classes 0); set model.kwargs.num_classes to the classes of the data"
        return None

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        height, width = model.get_submodule("patch_embed").img_size  # type: ignore[misc]
        return int(model.in_chans), int(height), int(width)  # type: ignore[arg-type]

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        converted: dict[str, Tensor] = checkpoint_filter_fn(
            dict(state),
            model,  # type: ignore[arg-type]  # what `matches` lets through
            adapt_layer_scale=True,
        )
        return converted

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        groups: list[UnitGroup] = []
        for path, block in _blocks(model):
            groups += self._attention_groups(block.get_submodule("attn"), f"{path}.attn")
            groups += self._mlp_groups(block.get_submodule("mlp"), f"{path}.mlp")
        return groups

    def _attention_groups(self, attention: nn.Module, path: str) -> list[UnitGroup]:
        heads, head_dim = int(attention.num_heads), int(attention.head_dim)  # type: ignore[arg-type]
        wide = heads * head_dim
        width = _linear(attention, "qkv").in_features
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

    def _mlp_groups(self, mlp: nn.Module, path: str) -> list[UnitGroup]:
        hidden, spans = _mlp_spans(mlp, path)
        width = _linear(mlp, spans[0].linear.removeprefix(f"{path}.")).in_features
        firsts = dict.fromkeys(span.linear for span in spans if span.axis == 0)
        groups = [UnitGroup(path, "mlp_in", width, tuple(Span(name, 1, 0, width) for name in firsts), sliceable=False)]
        if self._mlp_limit(mlp) is None:
            groups.append(UnitGroup(path, "mlp_hidden", hidden, spans))
        return groups

    @staticmethod
    def _head_dim_limit(attention: nn.Module) -> str | None:
        if not (_is_identity(attention, "q_norm") and _is_identity(attention, "k_norm")):
            return "a norm over the head dim of q and k"
        if not _is_identity(attention, "norm"):
            return "a norm over the attention output"
        return None

    @staticmethod
    def _mlp_limit(mlp: nn.Module) -> str | None:
        return None if _is_identity(mlp, "norm") else "a norm over the hidden layer"

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        found: list[Factorizable] = []
        for path, block in _blocks(model):
            found += [Factorizable(f"{path}.attn.{name}", "attention", name == "proj") for name in ("qkv", "proj")]
            mlp = block.get_submodule("mlp")
            found += [
                Factorizable(f"{path}.mlp.{name}", "mlp", name == "fc2")
                for name, child in mlp.named_children()
                if isinstance(child, nn.Linear)
            ]
        return found

    def branches(self, model: nn.Module) -> dict[str, tuple[Branch, ...]]:
        return {
            path: (
                Branch(f"{path}.norm1", f"{path}.attn", f"{path}.attn.proj", f"{path}.ls1"),
                Branch(f"{path}.norm2", f"{path}.mlp", f"{path}.mlp.fc2", f"{path}.ls2"),
            )
            for path, _ in _blocks(model)
        }

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
            for path, block in _blocks(model)
        ]

    def limits(self, model: nn.Module) -> list[str]:
        reasons: dict[str, None] = {}
        for _, block in _blocks(model):
            if (why := self._head_dim_limit(block.get_submodule("attn"))) is not None:
                reasons[f"head dims are left alone because of {why}"] = None
            if getattr(block.get_submodule("attn"), "gate", None) is not None:
                reasons["head dims are not factorised jointly because of a gate on the attention output"] = None
            if (why := self._mlp_limit(block.get_submodule("mlp"))) is not None:
                reasons[f"feed-forward neurons are left alone because of {why}"] = None
        return list(reasons)
