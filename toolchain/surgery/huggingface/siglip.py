"""SigLIP's image tower, alone (`SiglipVisionModel`) or out of a whole `SiglipModel`; SigLIP 2 at a fixed size is the same.

Zhai et al. 2023, arXiv 2303.15343; Tschannen et al. 2025, arXiv 2502.14786.
"""

from __future__ import annotations

from torch import Tensor

from toolchain.surgery.huggingface.encoder import vit_design
from toolchain.surgery.huggingface.layout import Design, Layout, VitConfig
from toolchain.surgery.huggingface.names import Rules, joined_qkv
from toolchain.surgery.huggingface.tower import OTHER_TOWER, tower_rules

_HEAD = r"(?:vision_model\.)?head\."


class SiglipConfig(VitConfig):
    """A config.json of SigLIP's image tower."""

    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    vision_use_head: bool = True


class SiglipLayout(Layout[SiglipConfig]):
    """Features are what attention pooling makes of the tokens; a classifier reads their mean; without pooling it gives tokens."""

    config: type[SiglipConfig] = SiglipConfig
    processor = "Siglip"
    rules: Rules = (
        *tower_rules(),
        (_HEAD + "probe", "attn_pool.latent"),
        (_HEAD + r"attention\.in_proj_?(\w+)", r"attn_pool.in_proj.\1"),
        (_HEAD + r"attention\.out_proj\.(\w+)", r"attn_pool.proj.\1"),
        (_HEAD + r"layernorm\.(\w+)", r"attn_pool.norm.\1"),
        (_HEAD + r"mlp\.(fc\d)\.(\w+)", r"attn_pool.mlp.\1.\2"),
        *OTHER_TOWER,
    )

    def design(self, config: SiglipConfig) -> Design:
        pool = "avg" if config.classes else "map" if config.vision_use_head else ""
        note = "Its attention pooling was left out: the classifier reads the mean of the patches."
        notes = (note,) if config.classes and config.vision_use_head else ()
        return vit_design(self, config, {"class_token": False, "global_pool": pool, "fc_norm": False}, notes=notes)

    def finished(self, state: dict[str, Tensor], config: SiglipConfig) -> dict[str, Tensor]:
        state = joined_qkv(state)
        state["pos_embed"] = state["pos_embed"].unsqueeze(0)
        for kind in ("weight", "bias"):
            if (whole := state.pop(f"attn_pool.in_proj.{kind}", None)) is not None:
                query, *rest = whole.tensor_split((whole.shape[0] // 3,))
                state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = query, rest[0]
        if config.classes or not config.vision_use_head:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("attn_pool.")}
        return state


SIGLIP_VISION = SiglipLayout("siglip_vision_model")
SIGLIP = SiglipLayout("siglip", "vision_config")
