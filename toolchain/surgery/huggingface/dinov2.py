"""DINOv2, without registers and with them (`Dinov2Model`, `Dinov2WithRegistersModel`).

Oquab et al. 2023, arXiv 2304.07193; Darcet et al. 2024, arXiv 2309.16588.
"""

from __future__ import annotations

from torch import Tensor

from toolchain.settings import Positive
from toolchain.surgery.huggingface.encoder import encoder_rules, vit_design
from toolchain.surgery.huggingface.layout import IMAGENET, Config, Design, Layout, Size, VitConfig
from toolchain.surgery.huggingface.names import joined_qkv
from toolchain.surgery.resampling import Resampling


class Dinov2Config(Config):
    """A config.json of DINOv2."""

    hidden_size: Positive = 768
    num_hidden_layers: Positive = 12
    num_attention_heads: Positive = 12
    mlp_ratio: float = 4
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    patch_size: Size = (14, 14)
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0

    @property
    def hidden(self) -> int:
        """Outputs of an MLP's first linear; those of a gated one are two thirds of it, in eights, twice."""
        hidden = int(self.hidden_size * self.mlp_ratio)
        return 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8) if self.use_swiglu_ffn else hidden

    @property
    def encoder(self) -> VitConfig:
        """The same in the words of a plain vision transformer."""
        values = self.model_dump(include=set(VitConfig.model_fields))
        return VitConfig(**values, intermediate_size=self.hidden)


class Dinov2WithRegistersConfig(Dinov2Config):
    """A config.json of DINOv2 with registers."""

    patch_size: Size = (16, 16)
    num_register_tokens: int = 4


class Dinov2Layout(Layout[Dinov2Config]):
    """Features are the class token after the last norm. Registers have no positions, so timm's form gives none to the class token."""

    normalisation = IMAGENET
    processor = "Bit"
    any_size = True
    rules = encoder_rules(
        r"dinov2(?:_with_registers)?",
        (r"embeddings\.register_tokens", "reg_token"),
        (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"encoder\.layer\.(\d+)\.mlp\.(fc1|weights_in)\.(\w+)", r"blocks.\1.mlp.fc1.\3"),
        (r"encoder\.layer\.(\d+)\.mlp\.(fc2|weights_out)\.(\w+)", r"blocks.\1.mlp.fc2.\3"),
    )

    def __init__(self, name: str, config: type[Dinov2Config], *, antialias: bool) -> None:
        super().__init__(name)
        self.config, self.resampling = config, Resampling(antialias=antialias)

    def design(self, config: Dinov2Config) -> Design:
        changes: dict[str, object] = {"num_classes": 0}
        if config.use_swiglu_ffn:
            changes["act_layer"] = "silu"
        if config.num_register_tokens:
            changes |= {"reg_tokens": config.num_register_tokens, "no_embed_class": True}
        notes = (_CLASSIFIER,) if config.classes else ()
        names = {1e-6: "vit_giant_patch14_dinov2" if config.use_swiglu_ffn else "vit_base_patch14_dinov2"}
        return vit_design(self, config.encoder, changes, names=names, notes=notes)

    def finished(self, state: dict[str, Tensor], config: Dinov2Config) -> dict[str, Tensor]:
        state = joined_qkv(state)
        if not config.num_register_tokens:
            state.pop("reg_token", None)  # of no rows
        if config.num_register_tokens:
            positions = state["pos_embed"].float()  # a sum in half precision is another number
            state["cls_token"] = state["cls_token"].float() + positions[:, :1]
            state["pos_embed"] = positions[:, 1:]
        if config.classes:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        return state


_CLASSIFIER = (
    "Its classifier was left out: it reads the class token beside the mean of the patches, and timm's reads one of the "
    "two. The model gives features."
)
DINOV2 = Dinov2Layout("dinov2", Dinov2Config, antialias=False)
DINOV2_WITH_REGISTERS = Dinov2Layout("dinov2_with_registers", Dinov2WithRegistersConfig, antialias=True)
