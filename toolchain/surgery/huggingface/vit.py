"""ViT (`ViTModel`, `ViTForImageClassification`) and the encoder of MAE (`ViTMAEModel`): timm's VisionTransformer.

Dosovitskiy et al. 2021, arXiv 2010.11929; He et al. 2022, arXiv 2111.06377.
"""

from __future__ import annotations

from torch import Tensor

from toolchain.surgery.huggingface.encoder import encoder_rules, vit_design
from toolchain.surgery.huggingface.layout import Design, Layout, VitConfig
from toolchain.surgery.huggingface.names import joined_qkv


class VitLayout(Layout[VitConfig]):
    """The class token after the last norm is what the classifier reads."""

    config = VitConfig
    rules = encoder_rules("vit")

    def design(self, config: VitConfig) -> Design:
        return vit_design(self, config)

    def finished(self, state: dict[str, Tensor], config: VitConfig) -> dict[str, Tensor]:  # noqa: ARG002
        return joined_qkv(state)


VIT = VitLayout("vit")
VIT_MAE = VitLayout("vit_mae")
