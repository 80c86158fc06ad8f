"""timm's BEiT, v1 and v2: pre-norm blocks with a bias of relative positions in the logits, of each block or of all.

Bao et al. 2022, arXiv 2106.08254; Peng et al. 2022, arXiv 2208.06366.
"""

from __future__ import annotations

from collections.abc import Mapping

from timm.models.beit import Beit, Block, checkpoint_filter_fn
from torch import Tensor, nn

from toolchain.families.blocks import Layer, plain_layers
from toolchain.families.narrow import NarrowBeitAttention, narrow_state
from toolchain.families.stacked import StackedFamily


def shared_bias(model: nn.Module) -> Mapping[str, Tensor]:
    """The bias [H, N, N] that all blocks share, as the model hands it to their attention; {} without one."""
    shared = getattr(model, "rel_pos_bias", None)
    return {} if shared is None else {"shared_rel_pos_bias": shared()}


class BeitFamily(StackedFamily):
    """Units: as of a plain ViT. The bias is added after the scale, so queries and keys reduce as without it, and it stays."""

    name = "beit"
    timm_modules = ("beit",)
    model_type, attention_types = Beit, (NarrowBeitAttention,)
    block_types, block_words = (Block,), "BEiT's own block is"
    attention_words = "BEiT's own attention is"

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return narrow_state(checkpoint_filter_fn(dict(state), model), model)

    def layers(self, model: nn.Module, block: nn.Module, path: str, index: int) -> list[Layer]:  # noqa: ARG002
        return plain_layers(block, path, shared_bias)


BEIT = BeitFamily()
