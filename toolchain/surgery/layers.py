"""Makes a model output the tokens after some blocks, and removes the blocks after the last of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from toolchain.errors import ModelError
from toolchain.families import Block, Family
from toolchain.families.layered import Layered, LayeredFamily


def read_layers(module: nn.Module, family: Family, layers: Sequence[int]) -> Family:
    """Makes a module give the tokens after some blocks, in place, and cuts off those after the last; its family from then on.

    Raises:
        ModelError: there is no such block, or what comes after the last cannot be cut off.
    """
    if not layers:
        return family
    blocks = family.trunk(module)
    if layers[-1] >= len(blocks):
        raise ModelError(
            f"model.layers asks for block {layers[-1]}; the model's are numbered from 0 to {len(blocks) - 1}"
        )
    unread = unread_blocks(module, family, layers)
    if any(block.bridge is not None for block in unread):
        raise ModelError(
            f"model.layers ends with block {layers[-1]}, and stages after it cannot be cut off; add the last block, "
            f"{len(blocks) - 1}"
        )
    for block in reversed(unread):
        parent, _, name = block.path.rpartition(".")
        del module.get_submodule(parent)[int(name)]  # type: ignore[operator]
    return as_layered(module, family, layers)


def unread_blocks(module: nn.Module, family: Family, layers: Sequence[int]) -> list[Block]:
    """The blocks after the last that is read."""
    return family.trunk(module)[layers[-1] + 1 :]


def as_layered(module: nn.Module, family: Family, layers: Sequence[int], *, normed: bool = True) -> Family:
    """Makes a module give the tokens after some blocks, in place, and cuts nothing off; its family from then on."""
    kind, layered = type(module), LayeredFamily(family, tuple(layers), normed)
    module.__class__ = type(f"Layered{kind.__name__}", (Layered, kind), {"layered_family": layered})
    return layered
