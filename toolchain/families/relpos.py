"""timm's VisionTransformerRelPos: a bias of relative positions in the logits, of each block or of all, from a table or an MLP."""

from __future__ import annotations

from collections.abc import Mapping

from timm.models import vision_transformer_relpos
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from toolchain.families.blocks import Layer, plain_layers
from toolchain.families.narrow import NarrowRelPosAttention
from toolchain.families.stacked import StackedFamily


def shared_bias(model: nn.Module) -> Mapping[str, Tensor]:
    """The bias [1, H, N, N] that all blocks share, as the model hands it to their attention; {} where each has its own."""
    shared = getattr(model, "shared_rel_pos", None)
    return {} if shared is None else {"shared_rel_pos": shared.get_bias()}


class RelPosFamily(StackedFamily):
    """Units: as of a plain ViT. The bias is added after the scale, so queries and keys reduce as without it, and it stays."""

    name = "relpos"
    timm_modules = ("vision_transformer_relpos",)
    model_type, attention_types = VisionTransformerRelPos, (NarrowRelPosAttention,)
    block_types, block_words = (RelPosBlock, ResPostRelPosBlock), "RelPosBlock and ResPostRelPosBlock are"
    attention_words = "RelPosAttention is"

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        resample = getattr(vision_transformer_relpos, "checkpoint_filter_fn", None)  # of tables; older timm has none
        return dict(state) if resample is None else resample(dict(state), model)

    def layers(self, model: nn.Module, block: nn.Module, path: str, index: int) -> list[Layer]:  # noqa: ARG002
        return plain_layers(block, path, shared_bias, post=isinstance(block, ResPostRelPosBlock))


RELPOS = RelPosFamily()
