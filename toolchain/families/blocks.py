"""What timm's transformer blocks have in common, whatever their attention: blocks by path, MLPs, and what may be said of them."""

from __future__ import annotations

from collections.abc import Iterator

from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import nn

from toolchain.families.base import Factorizable, Span, UnitGroup

INSTEAD = "; attention can shrink by low rank"
"""What follows where head dims stay as they are."""


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, block), in forward order."""
    found = model.get_submodule("blocks")
    return ((f"blocks.{name}", block) for name, block in found.named_children())


def linear(module: nn.Module, path: str) -> nn.Linear:
    """The linear at a path; raises TypeError if something else is there."""
    found = module.get_submodule(path)
    if not isinstance(found, nn.Linear):
        raise TypeError(f"{path} is a {type(found).__name__}, expected nn.Linear")
    return found


def is_identity(module: nn.Module, name: str) -> bool:
    """Whether a part is absent, None or an identity."""
    return isinstance(getattr(module, name, None) or nn.Identity(), nn.Identity)


def refused_mlp(mlp: nn.Module, path: str) -> str | None:
    """Why an MLP cannot be compressed, or None."""
    if type(mlp) in (Mlp, GluMlp, SwiGLU) and isinstance(mlp.fc2, nn.Linear):
        return None
    return f"{path} is a {type(mlp).__name__}; only Mlp, GluMlp and SwiGLU of linears are supported"


def refused_output(model: nn.Module) -> str | None:
    """Why the way from the last block to the logits is not supported, or None."""
    if getattr(model, "attn_pool", None) is not None:
        return "attention pooling (global_pool 'map' or 'prr') is not supported"
    if model.global_pool == "":
        return "it gives a row of logits per token (global_pool ''); set model.kwargs.global_pool to 'token' or 'avg'"
    if not model.num_classes or isinstance(model.get_submodule("head"), nn.Identity):
        return (
            "it has no classifier (num_classes 0); set model.checkpoint to weights that were trained on classes and "
            "model.kwargs.num_classes to their number, or add [train]"
        )
    return None


def image_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the image that the model was built for."""
    height, width = model.get_submodule("patch_embed").img_size  # type: ignore[misc]
    return int(model.in_chans), int(height), int(width)  # type: ignore[arg-type]


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
    if mlp_limit(mlp) is None:
        groups.append(UnitGroup(path, "mlp_hidden", hidden, spans))
    return groups


def mlp_limit(mlp: nn.Module) -> str | None:
    """Why its neurons are left alone, or None."""
    return None if is_identity(mlp, "norm") else "a norm over the hidden layer"


def factorizable(module: nn.Module, path: str, kind: str, last: str) -> list[Factorizable]:
    """Every linear of a branch's module, in its order; `last` names the one that ends the branch."""
    return [
        Factorizable(f"{path}.{name}", kind, name == last)
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
