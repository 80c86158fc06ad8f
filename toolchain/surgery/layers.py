"""Intermediate layers as the outputs of a model: the same modules under the same paths, and another forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from toolchain.errors import ModelError
from toolchain.families import Family, Step


class Layered(nn.Module):
    """What a model's class is mixed with so that it gives the tokens after some blocks; like a parametrization of torch's.

    Attributes:
        layered_family: what declares its blocks.
        layered_blocks: which of them are read, in rising order.
        layered_normed: whether through the model's last norm, as timm's forward_intermediates(norm=True) applies it.
    """

    layered_family: ClassVar[Family]  # names that no model of timm's has: Swin has stages that are called layers
    layered_blocks: ClassVar[tuple[int, ...]]
    layered_normed: ClassVar[bool]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, *, D] for each layer."""
        seen: list[Tensor] = []
        handles = [
            self.get_submodule(path).register_forward_hook(lambda _block, _given, stream: seen.append(stream))
            for path in readings(self, self.layered_family)
        ]
        try:
            self.forward_features(images)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()
        return (
            tuple(self.layered_family.tokens(self, stream) for stream in seen) if self.layered_normed else tuple(seen)
        )


def read_layers(module: nn.Module, family: Family, layers: Sequence[int]) -> None:
    """Makes a module give the tokens after some blocks, in place; blocks after the last of them are cut off.

    Raises:
        ModelError: there is no such block, or what comes after the last cannot be cut off.
    """
    if not layers:
        return
    blocks = family.blocks(module)
    if layers[-1] >= len(blocks):
        raise ModelError(
            f"model.layers asks for block {layers[-1]}; the model's are numbered from 0 to {len(blocks) - 1}"
        )
    unread = blocks[layers[-1] + 1 :]
    if any(block.bridge is not None for block in unread):
        raise ModelError(
            f"model.layers ends with block {layers[-1]}, and stages after it cannot be cut off; add the last block, "
            f"{len(blocks) - 1}"
        )
    for block in reversed(unread):
        parent, _, name = block.path.rpartition(".")
        del module.get_submodule(parent)[int(name)]  # type: ignore[operator]
    as_layered(module, family, layers)


def as_layered(module: nn.Module, family: Family, layers: Sequence[int], *, normed: bool = True) -> None:
    """Makes a module give the tokens after some blocks, in place; nothing of it is cut off."""
    kind = type(module)
    known = {"layered_family": family, "layered_blocks": tuple(layers), "layered_normed": normed}
    module.__class__ = type(f"Layered{kind.__name__}", (Layered, kind), known)


def readings(module: nn.Module, family: Family) -> dict[str, Step]:
    """Path of a block → what the module's next output is made by from the stream after it, in the order of the outputs."""
    blocks = family.blocks(module)
    if isinstance(module, Layered):
        read = family.tokens if module.layered_normed else _as_it_is
        return {blocks[index].path: read for index in module.layered_blocks}
    return {blocks[-1].path: family.head}


def _as_it_is(_module: nn.Module, stream: Tensor) -> Tensor:
    return stream


def as_given(module: nn.Module, parts: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The outputs that `readings` make, as the module itself gives them."""
    return parts if isinstance(module, Layered) else parts[0]
