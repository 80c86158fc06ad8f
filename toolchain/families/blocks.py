"""Declarations of timm's attentions, MLPs and the branches around them, shared by all families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers.layer_scale import LayerScale
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from toolchain.errors import ModelError
from toolchain.families.base import AttentionSite, Branch, Factorizable, Span, UnitGroup, pre_norm

Context = Callable[[nn.Module], Mapping[str, Tensor]]
"""What a part of a block takes besides the stream, by name, from the model."""
INSTEAD = "; attention can shrink by low rank"
"""What follows where head dims stay as they are."""


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, block), in forward order."""
    return ((f"blocks.{name}", block) for name, block in model.get_submodule("blocks").named_children())


def linear(module: nn.Module, path: str) -> nn.Linear:
    """The linear at a path; raises ModelError if something else is there."""
    child = module.get_submodule(path)
    if not isinstance(child, nn.Linear):
        is_pair = [name for name, _ in child.named_children()] == ["down", "up"]
        do = (
            "it has been split into two before: shrink the model from before that, to less"
            if is_pair
            else "merge adapters into the weights first (peft: merge_and_unload)"
        )
        raise ModelError(f"{path} is a {type(child).__name__} and no nn.Linear: {do}")
    return child


def is_identity(module: nn.Module, name: str) -> bool:
    """Whether a part is absent, None or an identity."""
    return isinstance(getattr(module, name, None) or nn.Identity(), nn.Identity)


def refused_mlp(mlp: nn.Module, path: str) -> str | None:
    """Why an MLP cannot be compressed, or None."""
    if type(mlp) in (Mlp, GluMlp, SwiGLU) and isinstance(mlp.fc2, nn.Linear):
        return None
    return f"{path} is a {type(mlp).__name__}; only Mlp, GluMlp and SwiGLU of linears are supported"


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


@dataclass(frozen=True)
class Part:
    """What one attention, or one MLP, declares; as in `Family`."""

    groups: Sequence[UnitGroup] = ()
    linears: Sequence[Factorizable] = ()
    restrictions: Sequence[str] = ()


@dataclass(frozen=True)
class Layer:
    """A branch with what is in it.

    Attributes:
        branch: the branch.
        part: what its attention or MLP declares, while all linears in it are whole.
        site: of its attention; None for an MLP.
    """

    branch: Branch
    part: Callable[[], Part]
    site: AttentionSite | None = None


def site_of(attention: nn.Module, path: str, queries: int | None = None) -> AttentionSite:
    """The site of an attention that has as many heads of values as it says, and as wide."""
    return AttentionSite(path, int(attention.num_heads), int(attention.head_dim), queries)  # type: ignore[arg-type]


def mlp_part(mlp: nn.Module, path: str) -> Part:
    """An MLP whose last linear is fc2."""
    names = [name for name, child in mlp.named_children() if isinstance(child, nn.Linear)]
    linears = [Factorizable(f"{path}.{name}", "mlp", name == "fc2") for name in names]
    why = mlp_restriction(mlp)
    return Part(
        mlp_groups(mlp, path),
        linears,
        restrictions=[] if why is None else [f"feed-forward neurons are left alone because of {why}"],
    )


def attention_linears(attention: nn.Module, path: str, names: tuple[str, ...]) -> list[Factorizable]:
    """Those of some linears that an attention has; the last ends its branch."""
    return [Factorizable(f"{path}.{name}", "attention", name == names[-1]) for name in present(attention, names)]


def fused_part(attention: nn.Module, path: str) -> Part:
    """An attention with q, k and v in one linear `qkv`, and an output as wide as its heads together."""
    heads, head_dim = int(attention.num_heads), int(attention.head_dim)  # type: ignore[arg-type]
    wide, width = heads * head_dim, linear(attention, "qkv").in_features
    readers = [Span(f"{path}.qkv", 1, 0, width)]
    query, *others = (
        Span(f"{path}.qkv", 0, index * wide, head_dim, role) for index, role in enumerate(("query", "key", "value"))
    )
    if gated := getattr(attention, "gate", None) is not None:
        readers.append(Span(f"{path}.gate", 1, 0, width))
        others.append(Span(f"{path}.gate", 0, 0, head_dim))
    spans = (query, *others, Span(f"{path}.proj", 1, 0, head_dim, "output"))
    groups = [UnitGroup(path, "attn_in", width, tuple(readers), sliceable=False)]
    reasons = []
    if (why := fixed_head_dim(attention)) is None:
        groups.append(head_dim_group(attention, path, spans, mixable=not gated))
    else:
        reasons.append(f"head dims are left alone because of {why}{INSTEAD}")
    if gated:
        reasons.append(f"head dims are not factorised jointly because of a gate on the attention output{INSTEAD}")
    groups.append(UnitGroup(path, "attn_out", wide, (Span(f"{path}.proj", 1, 0, wide),), sliceable=False))
    linears = attention_linears(attention, path, ("qkv", "proj"))
    return Part(groups, linears, reasons)


def head_dim_group(attention: nn.Module, path: str, spans: tuple[Span, ...], *, mixable: bool = True) -> UnitGroup:
    """The head dims of an attention; `spans` begin with those of the queries."""
    heads, total = int(attention.num_heads), spans[0].width  # type: ignore[arg-type]
    attrs: dict[str, Callable[[int], float]] = {"head_dim": lambda kept: kept}
    if hasattr(attention, "attn_dim"):
        attrs["attn_dim"] = lambda kept: heads * kept
    share = getattr(attention, "scale", total**-0.5) / total**-0.5  # 1, unless somebody changed the scale
    attrs["scale"] = lambda kept: share * kept**-0.5
    return UnitGroup(
        path,
        "head_dim",
        total,
        spans,
        heads,
        attrs=attrs,
        rescale_on_slice=spans[:1],
        mixable=mixable,
    )


def normed_heads(attention: nn.Module) -> str | None:
    """What of queries and keys keeps head dims from shrinking, or None."""
    plain = is_identity(attention, "q_norm") and is_identity(attention, "k_norm")
    return None if plain else "a norm over the head dim of q and k"


def fixed_head_dim(attention: nn.Module) -> str | None:
    """Why head dims cannot shrink, or None."""
    return normed_heads(attention) or (None if is_identity(attention, "norm") else "a norm over the attention output")


def rigid_part(attention: nn.Module, path: str, why: str, names: tuple[str, ...]) -> Part:
    """An attention whose head dims stay, of any linears that read its input, and `proj`.

    Args:
        attention, path: the attention.
        why: what keeps its head dims, for the user.
        names: of its linears that can be factorised, `proj` last.
    """
    readers = present(attention, (*names[:-1], "gate"))
    width, wide = linear(attention, readers[0]).in_features, linear(attention, names[-1]).in_features
    spans = tuple(Span(f"{path}.{name}", 1, 0, width) for name in readers)
    groups = [
        UnitGroup(path, "attn_in", width, spans, sliceable=False),
        UnitGroup(path, "attn_out", wide, (Span(f"{path}.{names[-1]}", 1, 0, wide),), sliceable=False),
    ]
    reasons = [f"head dims are left alone because of {why}{INSTEAD}"]
    return Part(groups, attention_linears(attention, path, names), reasons)


def residual(
    block: nn.Module, path: str, number: int, part: str, context: Context | None = None, *, post: bool = False
) -> Branch:
    """The branch of `part` ("attn" or "mlp") with the norm, the scale and the drop path of a number in a block.

    Args:
        block, path: the block.
        number: 1 or 2, in the names of the parts that belong to the branch.
        part: what the branch computes; its last linear is "proj" or "fc2".
        context: what the part takes besides, from the model.
        post: whether the norm comes after the part.
    """
    module, norm = f"{path}.{part}", f"{path}.norm{number}"
    return Branch(
        module,
        f"{module}.{'proj' if part == 'attn' else 'fc2'}",
        f"{path}.drop_path{number}",
        pre_norm(None if post else norm, module, context),
        scale_of(block, path, f"ls{number}", f"gamma_{number}"),
        norm=norm if post else None,
    )


def scale_of(block: nn.Module, path: str, layer: str, parameter: str = "") -> str | None:
    """The path of a LayerScale's parameter in a block, or of the block's own; None where it has none."""
    if isinstance(getattr(block, layer, None), LayerScale):
        return f"{path}.{layer}.gamma"
    return f"{path}.{parameter}" if getattr(block, parameter, None) is not None else None


def plain_layers(
    block: nn.Module,
    path: str,
    context: Context | None = None,
    *,
    post: bool = False,
    part: Callable[[nn.Module, str], Part] = fused_part,
    site: Callable[[nn.Module, str], AttentionSite] = site_of,
) -> list[Layer]:
    """An attention, then an MLP, each with a norm before it.

    Args:
        block, path: the block.
        context: what its attention takes besides, from the model.
        post: whether the norms come after instead.
        part, site: what the attention declares, from itself and its path.
    """
    attention, at = block.get_submodule("attn"), f"{path}.attn"
    mlp = partial(mlp_part, block.get_submodule("mlp"), f"{path}.mlp")
    return [
        Layer(residual(block, path, 1, "attn", context, post=post), partial(part, attention, at), site(attention, at)),
        Layer(residual(block, path, 2, "mlp", post=post), mlp),
    ]


def present(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Those of some parts that a module has."""
    return [name for name in names if getattr(module, name, None) is not None]
