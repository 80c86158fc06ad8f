"""Parts of attention whose input never changes, so that their output is a constant of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from timm.layers.pos_embed_rel import RelPosMlp
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from torch import Tensor, nn


@dataclass(frozen=True)
class Constant:
    """A child of a module, and what it is given."""

    owner: nn.Module
    name: str
    given: Tensor

    @property
    def part(self) -> nn.Module:
        """The child."""
        return self.owner.get_submodule(self.name)


def constants(model: nn.Module) -> Iterator[Constant]:
    """Every MLP that makes a table of biases from coordinates: those of Swin V2, and timm's RelPosMlp."""
    for module in model.modules():
        if isinstance(module, CosineAttention):
            yield Constant(module, "cpb_mlp", module.relative_coords_table)  # type: ignore[arg-type]
        if isinstance(module, RelPosMlp):
            yield Constant(module, "mlp", module.rel_coords_log)  # type: ignore[arg-type]
