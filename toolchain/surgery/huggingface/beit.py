"""BEiT (`BeitModel`, `BeitForImageClassification`): biases by relative position, keys without a bias.

Bao et al. 2022, arXiv 2106.08254.
"""

from __future__ import annotations

from torch import Tensor

from toolchain.surgery.huggingface.encoder import encoder_rules
from toolchain.surgery.huggingface.layout import Design, Layout, VitConfig, vit_kwargs
from toolchain.surgery.huggingface.names import Left, keyless_qkv

TABLE = r"relative_position_bias\.relative_position_bias_table"
INDEX = Left("timm computes it")


class BeitConfig(VitConfig):
    """A config.json of BEiT."""

    use_absolute_position_embeddings: bool = False
    use_relative_position_bias: bool = False
    use_shared_relative_position_bias: bool = False
    use_mean_pooling: bool = True
    layer_scale_init_value: float = 0.1

    @property
    def pools_patches(self) -> bool:
        """Whether it gives the mean of the patches; saved from masked pre-training, it has a norm over all tokens instead."""
        return self.use_mean_pooling and not any("MaskedImage" in name for name in self.architectures)


class BeitLayout(Layout[BeitConfig]):
    """The mean of the patches, normed, is what the classifier reads; or the class token, where config.json says so."""

    config = BeitConfig
    processor = "Beit"
    rules = encoder_rules(
        "beit",
        (rf"encoder\.layer\.(\d+)\.attention\.attention\.{TABLE}", r"blocks.\1.attn.relative_position_bias_table"),
        (rf"encoder\.{TABLE}", "rel_pos_bias.relative_position_bias_table"),
        (r".*relative_position_index", INDEX),
        (r"encoder\.layer\.(\d+)\.lambda_(\d)", r"blocks.\1.gamma_\2"),
        (r"pooler\.layernorm\.(\w+)", r"fc_norm.\1"),
        (r"lm_head\..*", Left("only masked pre-training reads it")),
    )

    def design(self, config: BeitConfig) -> Design:
        self.require_activation(config.hidden_act)
        rows, columns = (edge // patch for edge, patch in zip(config.image_size, config.patch_size, strict=True))
        if rows != columns and (config.use_relative_position_bias or config.use_shared_relative_position_bias):
            raise self.refusal(
                f"its biases by relative position are for {rows}×{columns} patches, and read as for a square"
            )
        kwargs = vit_kwargs(config) | {
            "global_pool": "avg" if config.pools_patches else "token",
            "init_values": max(0.0, config.layer_scale_init_value),
            "use_abs_pos_emb": config.use_absolute_position_embeddings,
            "use_rel_pos_bias": config.use_relative_position_bias,
            "use_shared_rel_pos_bias": config.use_shared_relative_position_bias,
        }
        return Design("beit_base_patch16_224", kwargs, self.norm_notes(config.layer_norm_eps, 1e-6))

    def finished(self, state: dict[str, Tensor], config: BeitConfig) -> dict[str, Tensor]:  # noqa: ARG002
        return keyless_qkv(state)


BEIT = BeitLayout("beit")
