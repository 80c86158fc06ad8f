"""CLIP's image tower, alone (`CLIPVisionModel`, `…WithProjection`) or out of a whole `CLIPModel`.

Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from torch import Tensor

from toolchain.surgery.huggingface.encoder import vit_design
from toolchain.surgery.huggingface.layout import Design, Layout, Size, VitConfig
from toolchain.surgery.huggingface.names import Left, joined_qkv
from toolchain.surgery.huggingface.tower import OTHER_TOWER, tower_rules


class ClipConfig(VitConfig):
    """A config.json of CLIP's image tower."""

    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    patch_size: Size = (32, 32)


class ClipLayout(Layout[ClipConfig]):
    """Features are the class token after the last norm; a classifier reads the mean of the patches before it."""

    config = ClipConfig
    processor = "CLIP"
    normalisation = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    rules = (
        *tower_rules(),
        (r"(?:vision_model\.)?embeddings\.class_embedding", "cls_token"),
        (r"(?:vision_model\.)?pre_layrnorm\.(\w+)", r"norm_pre.\1"),
        (
            r"visual_projection\.weight",
            Left("features are those before the projection to what images and texts share"),
        ),
        *OTHER_TOWER,
    )

    def design(self, config: ClipConfig) -> Design:
        if not config.classes:
            return vit_design(self, config, {"pre_norm": True})
        note = "Its last norm was left out: the classifier reads the mean of the patches before it."
        return vit_design(self, config, {"pre_norm": True, "global_pool": "avg", "final_norm": False}, notes=(note,))

    def finished(self, state: dict[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
        state = joined_qkv(state)
        state["cls_token"] = state["cls_token"].reshape(1, 1, -1)
        state["pos_embed"] = state["pos_embed"].unsqueeze(0)
        if config.classes:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
        return state


CLIP_VISION = ClipLayout("clip_vision_model")
CLIP = ClipLayout("clip", "vision_config", "vision_config_dict")
