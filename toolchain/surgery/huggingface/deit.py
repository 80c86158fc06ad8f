"""DeiT (`DeiTModel`, `DeiTForImageClassification`, `…WithTeacher`), which has a second token for distillation.

Touvron et al. 2021, arXiv 2012.12877.
"""

from __future__ import annotations

from torch import Tensor

from toolchain.surgery.huggingface.encoder import encoder_rules, vit_design
from toolchain.surgery.huggingface.layout import IMAGENET, Design, Layout, VitConfig
from toolchain.surgery.huggingface.names import joined_qkv

DISTILLED = {1e-6: "deit_base_distilled_patch16_224"}


class DeitLayout(Layout[VitConfig]):
    """With both classifiers it is timm's distilled form; with one, which reads the class token, the other token is a register."""

    config = VitConfig
    rules = encoder_rules(
        "deit",
        (r"embeddings\.distillation_token", "dist_token"),
        (r"cls_classifier\.(\w+)", r"head.\1"),
        (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
    )
    normalisation = IMAGENET
    processor = "DeiT"

    def design(self, config: VitConfig) -> Design:
        if self._has_two(config):
            return vit_design(self, config, names=DISTILLED)
        return vit_design(self, config, {"reg_tokens": 1})

    def finished(self, state: dict[str, Tensor], config: VitConfig) -> dict[str, Tensor]:
        if not self._has_two(config) and "dist_token" in state:
            state = {("reg_token" if name == "dist_token" else name): tensor for name, tensor in state.items()}
        return joined_qkv(state)

    @staticmethod
    def _has_two(config: VitConfig) -> bool:
        return any("WithTeacher" in name for name in config.architectures)


DEIT = DeitLayout("deit")
