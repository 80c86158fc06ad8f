"""What timm's columnar transformers have in common, whatever their attention: pre-norm blocks by path, MLPs, the way out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Block, Branch, Factorizable, Family, Span, UnitGroup

INSTEAD = "; attention can shrink by low rank"
"""What follows where head dims stay as they are."""


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, block), in forward order."""
    return ((f"blocks.{name}", block) for name, block in model.get_submodule("blocks").named_children())


def linear(module: nn.Module, path: str) -> nn.Linear:
    """The linear at a path; raises TypeError if something else is there."""
    child = module.get_submodule(path)
    if not isinstance(child, nn.Linear):
        raise TypeError(f"{path} is a {type(child).__name__}, expected nn.Linear")
    return child


def is_identity(module: nn.Module, name: str) -> bool:
    """Whether a part is absent, None or an identity."""
    return isinstance(getattr(module, name, None) or nn.Identity(), nn.Identity)


def refused_mlp(mlp: nn.Module, path: str) -> str | None:
    """Why an MLP cannot be compressed, or None."""
    if type(mlp) in (Mlp, GluMlp, SwiGLU) and isinstance(mlp.fc2, nn.Linear):
        return None
    return f"{path} is a {type(mlp).__name__}; only Mlp, GluMlp and SwiGLU of linears are supported"


def refused_output(model: nn.Module) -> str | None:
    """Why the way from the last block to the outputs is not supported, or None."""
    if getattr(model, "attn_pool", None) is not None:
        return "attention pooling (global_pool 'map' or 'prr') is not supported"
    if model.global_pool == "" and model.num_classes:
        return (
            "it gives a row of logits per token (global_pool ''); set model.kwargs.global_pool to 'token' or 'avg', or "
            "model.kwargs.num_classes to 0 for the tokens themselves"
        )
    return None


def mlp_spans(mlp: nn.Module, path: str) -> tuple[int, tuple[Span, ...]]:
    """(hidden width M, the spans of a hidden neuron) for the three MLP layouts of timm.

    The first linear's outputs hold a neuron once (Mlp), or twice: side by side in one packed fc1 (GluMlp), or in two
    linears (SwiGLU). fc2 reads it once.
    """
    hidden = linear(mlp, "fc2").in_features
    if isinstance(mlp, SwiGLU):
        first: tuple[Span, ...] = (Span(f"{path}.fc1_g", 0, 0, hidden), Span(f"{path}.fc1_x", 0, 0, hidden))
    elif isinstance(mlp, GluMlp):
        first = (Span(f"{path}.fc1", 0, 0, hidden), Span(f"{path}.fc1", 0, hidden, hidden))
    else:
        first = (Span(f"{path}.fc1", 0, 0, hidden),)
    return hidden, (*first, Span(f"{path}.fc2", 1, 0, hidden))


def mlp_groups(mlp: nn.Module, path: str) -> list[UnitGroup]:
    """mlp_in, which is only zeroed, and mlp_hidden where nothing mixes the neurons."""
    hidden, spans = mlp_spans(mlp, path)
    width = linear(mlp, spans[0].linear.removeprefix(f"{path}.")).in_features
    firsts = dict.fromkeys(span.linear for span in spans if span.axis == 0)
    groups = [UnitGroup(path, "mlp_in", width, tuple(Span(name, 1, 0, width) for name in firsts), sliceable=False)]
    if mlp_restriction(mlp) is None:
        groups.append(UnitGroup(path, "mlp_hidden", hidden, spans))
    return groups


def mlp_restriction(mlp: nn.Module) -> str | None:
    """Why its neurons are left alone, or None."""
    return None if is_identity(mlp, "norm") else "a norm over the hidden layer"


class PreNormFamily(Family):
    """A model of one stage, `blocks`, each a norm and attention, a norm and an MLP.

    Attributes:
        model_type, block_type, attention_types: timm's classes; a subclass may compute something else.
        block_words, attention_words: what is supported, for messages.
        linears: of attention, those that may be there, in forward order; the last ends the branch.
    """

    model_type: type[nn.Module]
    block_type: type[nn.Module]
    attention_types: tuple[type[nn.Module], ...]
    block_words: str
    attention_words: str
    linears: tuple[str, ...]

    @abstractmethod
    def attention_groups(self, attention: nn.Module, path: str) -> list[UnitGroup]:
        """The units of one attention."""

    @abstractmethod
    def attention_restrictions(self, model: nn.Module, attention: nn.Module) -> list[str]:
        """What cannot be done on one attention."""

    @abstractmethod
    def block_branches(self, block: nn.Module, path: str, index: int) -> tuple[Branch, ...]:
        """The branches of one block."""

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, self.model_type)

    def refuses(self, model: nn.Module) -> str | None:
        if not self.matches(model):
            return f"{type(model).__name__} is not a timm {self.model_type.__name__}"
        every = list(blocks(model))
        if not every:
            return "the model has no blocks"
        for path, block in every:
            if type(block) is not self.block_type:
                return f"{path} is a {type(block).__name__}; only {self.block_words} is supported"
            if type(block.attn) not in self.attention_types:
                return f"{path}.attn is a {type(block.attn).__name__}; only {self.attention_words} supported"
            if (why := refused_mlp(block.get_submodule("mlp"), f"{path}.mlp")) is not None:
                return why
        return refused_output(model)

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        height, width = model.get_submodule("patch_embed").img_size  # type: ignore[misc]
        return int(model.in_chans), int(height), int(width)  # type: ignore[arg-type]

    def patch_size(self, model: nn.Module) -> tuple[int, int] | None:
        patches = model.get_submodule("patch_embed")
        rows, columns = patches.patch_size  # type: ignore[misc]
        return None if getattr(patches, "dynamic_img_pad", False) else (int(rows), int(columns))

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        groups: list[UnitGroup] = []
        for path, block in blocks(model):
            groups += self.attention_groups(block.get_submodule("attn"), f"{path}.attn")
            groups += mlp_groups(block.get_submodule("mlp"), f"{path}.mlp")
        return groups

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        items: list[Factorizable] = []
        for path, block in blocks(model):
            names = present(block.get_submodule("attn"), self.linears)
            items += [Factorizable(f"{path}.attn.{name}", "attention", name == self.linears[-1]) for name in names]
            items += [
                Factorizable(f"{path}.mlp.{name}", "mlp", name == "fc2")
                for name, child in block.get_submodule("mlp").named_children()
                if isinstance(child, nn.Linear)
            ]
        return items

    def blocks(self, model: nn.Module) -> list[Block]:
        every = enumerate(blocks(model))
        return [Block(path, self.block_branches(block, path, index)) for index, (path, block) in every]

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

    def restrictions(self, model: nn.Module) -> list[str]:
        reasons: dict[str, None] = {}
        for _, block in blocks(model):
            reasons |= dict.fromkeys(self.attention_restrictions(model, block.get_submodule("attn")))
            if (why := mlp_restriction(block.get_submodule("mlp"))) is not None:
                reasons[f"feed-forward neurons are left alone because of {why}"] = None
        return list(reasons)


def present(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Those of some parts that a module has."""
    return [name for name in names if getattr(module, name, None) is not None]
