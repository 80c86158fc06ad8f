"""DINOv3's vision transformer (`DINOv3ViTModel`): timm's Eva with rotary positions.

Siméoni et al. 2025, arXiv 2508.10104.
"""

from __future__ import annotations

import re

from torch import Tensor

from toolchain.settings import Positive
from toolchain.surgery.huggingface.layout import IMAGENET, Design, Layout, VitConfig, vit_kwargs
from toolchain.surgery.huggingface.names import MASKED, keyless_qkv

LAYER = r"(?:model\.)?layer\.(\d+)\."


class Dinov3Config(VitConfig):
    """A config.json of DINOv3."""

    hidden_size: Positive = 384
    intermediate_size: Positive = 1536
    num_attention_heads: Positive = 6
    layer_norm_eps: float = 1e-5
    rope_theta: float = 100.0
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    num_register_tokens: int = 0


class Dinov3Layout(Layout[Dinov3Config]):
    """Features are the class token after the last norm."""

    config = Dinov3Config
    normalisation = IMAGENET
    processor = "DINOv3ViT"
    any_size = True
    rules = (
        (r"embeddings\.cls_token", "cls_token"),
        (r"embeddings\.mask_token", MASKED),
        (r"embeddings\.register_tokens", "reg_token"),
        (r"embeddings\.patch_embeddings\.(\w+)", r"patch_embed.proj.\1"),
        (LAYER + r"attention\.q_proj\.(\w+)", r"blocks.\1.attn.query.\2"),
        (LAYER + r"attention\.k_proj\.(\w+)", r"blocks.\1.attn.key.\2"),
        (LAYER + r"attention\.v_proj\.(\w+)", r"blocks.\1.attn.value.\2"),
        (LAYER + r"attention\.o_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (LAYER + r"layer_scale(\d)\.lambda1", r"blocks.\1.gamma_\2"),
        (LAYER + r"mlp\.(\w+)_proj\.(\w+)", r"blocks.\1.mlp.\2.\3"),
        (LAYER + r"norm(\d)\.(\w+)", r"blocks.\1.norm\2.\3"),
        (r"norm\.(\w+)", r"norm.\1"),
    )

    def design(self, config: Dinov3Config) -> Design:
        self.require_activation(config.hidden_act, "silu" if config.use_gated_mlp else "gelu")
        kwargs = vit_kwargs(config) | {
            "num_classes": 0,
            "global_pool": "token",
            "qkv_bias": config.query_bias or config.value_bias,
            "num_reg_tokens": config.num_register_tokens,
            "rope_temperature": config.rope_theta,
            "dynamic_img_size": False,
        }
        if config.use_gated_mlp:
            kwargs |= {"swiglu_mlp": True, "swiglu_align_to": 1}
        return Design("vit_base_patch16_dinov3", kwargs, self.norm_notes(config.layer_norm_eps, 1e-5))

    def finished(self, state: dict[str, Tensor], config: Dinov3Config) -> dict[str, Tensor]:
        words = (
            {"up": "fc1_x", "gate": "fc1_g", "down": "fc2"} if config.use_gated_mlp else {"up": "fc1", "down": "fc2"}
        )
        out = {re.sub(r"(?<=\.mlp\.)\w+", lambda part: words[part[0]], name, count=1): x for name, x in state.items()}
        for name in [name for name in out if re.search(r"\.(attn\.proj|mlp\.\w+)\.weight$", name)]:
            out.setdefault(name.replace("weight", "bias"), out[name].new_zeros(out[name].shape[0]))
        if not config.num_register_tokens:
            out.pop("reg_token", None)
        return keyless_qkv(out)


DINOV3 = Dinov3Layout("dinov3_vit")
