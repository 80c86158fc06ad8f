"""What a block is built of, without its sizes: two blocks of one structure are computed, cut and exported alike."""

from __future__ import annotations

from collections.abc import Iterator

from timm.layers.drop import DropPath
from torch import nn

from toolchain.families import family_of

Structure = tuple[object, ...]

AROUND = (
    "patch_embed",
    "embeds",
    "norm",
    "norm_pre",
    "fc_norm",
    "head",
    "head_dist",
    "head_drop",
    "pos_drop",
    "patch_drop",
)
"""Children of a model that no block is given anything by."""


def structure(module: nn.Module) -> Structure:
    """Types, flags and relations of a module and all that is in it; what is an identity in eval mode is one."""
    if isinstance(module, DropPath | nn.Dropout):
        return (_kind(nn.Identity()),)
    flags = sorted((name, mark) for name, value in vars(module).items() if (mark := _mark(name, value)) is not None)
    tensors = sorted((name, tensor is not None) for name, tensor in {**module._parameters, **module._buffers}.items())
    parts = sorted((name, None if part is None else structure(part)) for name, part in module._modules.items())
    return (_kind(module), *_relations(module), *flags, *tensors, *parts)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _mark(name: str, value: object) -> object:
    """What of an attribute is structure: a flag or a word as it is, whether anything is shifted; None of all else."""
    if name.startswith("_") or name == "training":
        return None
    if isinstance(value, bool | str):
        return value
    if isinstance(value, tuple) and value and all(isinstance(each, int) for each in value):
        return any(value)
    return None


def _relations(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Of an attention: whether heads share keys, and whether they are as wide as the stream together."""
    heads, kv_heads = getattr(module, "num_heads", None), getattr(module, "num_kv_heads", None)
    if heads is not None and kv_heads is not None:
        yield "heads share keys", kv_heads != heads
    if heads is not None and isinstance(proj := getattr(module, "proj", None), nn.Linear):
        yield "heads are as wide as the stream", proj.in_features == proj.out_features


def kinds_in(structure: Structure) -> Iterator[object]:
    """The classes of all modules in a structure that are made of others."""
    parts = [part[1] for part in structure if isinstance(part, tuple) and isinstance(part[-1], tuple)]
    if parts:
        yield structure[0]
    for part in parts:
        yield from kinds_in(part)


def structures_of(model: nn.Module, name: str) -> frozenset[Structure]:
    """The structures of all blocks of a supported model, each with what the model gives all of them; raises ModelError."""
    family = family_of(model, name)
    blocks = family.blocks(model)
    containers = {block.path.partition(".")[0] for block in blocks}
    shared = tuple(
        (child, structure(part))
        for child, part in model.named_children()
        if child not in AROUND and child not in containers
    )
    return frozenset((family.name, structure(model.get_submodule(block.path)), shared) for block in blocks)
