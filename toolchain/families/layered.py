"""Models that output intermediate layers: the same modules under the same paths, with another forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Block, Factorizable, Family, Step, UnitGroup


class Layered(nn.Module):
    """Mixin that makes a model output the tokens after some blocks; set on the instance, as torch's parametrizations are.

    Attributes:
        layered_family: what declares its blocks, and which of them are read.
    """

    layered_family: ClassVar[
        LayeredFamily
    ]  # a name that no model of timm's has: Swin has stages that are called layers

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, *, D] for each layer."""
        readings = self.layered_family.readings(self)
        streams: list[Tensor] = []
        handles = [
            self.get_submodule(path).register_forward_hook(lambda _block, _inputs, stream: streams.append(stream))
            for path in readings
        ]
        try:
            self.forward_features(images)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()
        return tuple(read(self, stream) for read, stream in zip(readings.values(), streams, strict=True))


@dataclass(frozen=True)
class LayeredFamily(Family):
    """The family of a model that outputs the tokens after some blocks; later blocks and the head are ignored.

    Blocks end with the last that is read; no pool, no classifier and no choice of tokens comes after it.

    Attributes:
        family: of the whole model.
        layers: numbers of the blocks that are read, in rising order.
        normed: whether through the model's last norm, as timm's forward_intermediates(norm=True) applies it.
    """

    family: Family
    layers: tuple[int, ...]
    normed: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The family's."""
        return self.family.name

    def matches(self, model: nn.Module) -> bool:
        return self.family.matches(model)

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        return self.family.input_size(model)

    def patch_size(self, model: nn.Module) -> tuple[int, int] | None:
        return self.family.patch_size(model)

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return self.family.convert_checkpoint(state, model)

    def blocks(self, model: nn.Module) -> list[Block]:
        return self.family.trunk(model)[: self.layers[-1] + 1]

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        blocks = self.blocks(model)
        return [group for group in self.family.unit_groups(model) if _within(group.module, blocks)]

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        blocks = self.blocks(model)
        return [item for item in self.family.factorizable(model) if _within(item.linear, blocks)]

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        trunk = self.family.trunk(model)  # all of it runs
        return [site for site in self.family.attentions(model) if _within(site.module, trunk)]

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.family.tokens(model, x) if self.normed else x

    def readings(self, model: nn.Module) -> Mapping[str, Step]:
        blocks = self.blocks(model)
        return {blocks[index].path: self.head for index in self.layers}

    def outputs(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return parts

    def tokens(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.family.tokens(model, x)

    def restrictions(self, model: nn.Module) -> list[str]:
        return self.family.restrictions(model)


def _within(path: str, blocks: Sequence[Block]) -> bool:
    return any(block.holds(path) for block in blocks)
