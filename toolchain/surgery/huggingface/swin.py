"""Swin, versions 1 and 2 (`SwinModel`, `SwinForImageClassification`, `Swinv2…`).

Liu et al. 2021, arXiv 2103.14030; Liu et al. 2022, arXiv 2111.09883.
"""

from __future__ import annotations

import math

from torch import Tensor

from toolchain.settings import Positive
from toolchain.surgery.anatomy import by
from toolchain.surgery.huggingface.layout import IMAGENET, Config, Design, Layout, Size, plain
from toolchain.surgery.huggingface.names import MASKED, Left, joined_qkv, keyless_qkv

_OWN = r"(?:swin(?:v2)?\.)?"
_BLOCK = _OWN + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_COMPUTED = Left("timm computes it")


class SwinConfig(Config):
    """A config.json of Swin."""

    patch_size: Size = (4, 4)
    embed_dim: Positive = 96
    depths: tuple[Positive, ...] = (2, 2, 6, 2)
    num_heads: tuple[Positive, ...] = (3, 6, 12, 24)
    window_size: Positive = 7
    pretrained_window_sizes: tuple[int, ...] = (0, 0, 0, 0)
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    use_absolute_embeddings: bool = False
    layer_norm_eps: float = 1e-5


class SwinLayout(Layout[SwinConfig]):
    """The mean of the tokens after the last norm is what the classifier reads. timm halves the grid where a stage begins.

    Args:
        name: the model_type.
        architecture: timm's name.
        cosine: whether attention is version 2's, whose keys have no bias.
    """

    config = SwinConfig
    normalisation = IMAGENET
    rules = (
        (_OWN + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (_OWN + r"embeddings\.norm\.(\w+)", r"patch_embed.norm.\1"),
        (_OWN + r"embeddings\.mask_token", MASKED),
        (_BLOCK + r"attention\.self\.(query|key|value)\.(\w+)", r"layers.\1.blocks.\2.attn.\3.\4"),
        (
            _BLOCK + r"attention\.self\.relative_position_bias_table",
            r"layers.\1.blocks.\2.attn.relative_position_bias_table",
        ),
        (
            _BLOCK + r"attention\.self\.continuous_position_bias_mlp\.(\d)\.(\w+)",
            r"layers.\1.blocks.\2.attn.cpb_mlp.\3.\4",
        ),
        (_BLOCK + r"attention\.self\.logit_scale", r"layers.\1.blocks.\2.attn.logit_scale"),
        (_BLOCK + r"attention\.self\.relative_(?:position_index|coords_table)", _COMPUTED),
        (_BLOCK + r"attention\.output\.dense\.(\w+)", r"layers.\1.blocks.\2.attn.proj.\3"),
        (_BLOCK + r"intermediate\.dense\.(\w+)", r"layers.\1.blocks.\2.mlp.fc1.\3"),
        (_BLOCK + r"output\.dense\.(\w+)", r"layers.\1.blocks.\2.mlp.fc2.\3"),
        (_BLOCK + r"layernorm_before\.(\w+)", r"layers.\1.blocks.\2.norm1.\3"),
        (_BLOCK + r"layernorm_after\.(\w+)", r"layers.\1.blocks.\2.norm2.\3"),
        (_OWN + r"encoder\.layers\.(\d+)\.downsample\.(\w+)\.(\w+)", r"downsample.\1.\2.\3"),
        (_OWN + r"layernorm\.(\w+)", r"norm.\1"),
        (r"classifier\.(\w+)", r"head.fc.\1"),
        (r"decoder\..*", MASKED),
    )

    def __init__(self, name: str, architecture: str, *, cosine: bool) -> None:
        super().__init__(name)
        self.architecture, self.cosine = architecture, cosine

    def design(self, config: SwinConfig) -> Design:
        self.require_activation(config.hidden_act)
        if config.use_absolute_embeddings:
            raise self.refusal("it adds absolute positions")
        self.require_windows(config)
        kwargs: dict[str, object] = {
            "img_size": plain(config.image_size),
            "patch_size": plain(config.patch_size),
            "in_chans": config.num_channels,
            "embed_dim": config.embed_dim,
            "depths": list(config.depths),
            "num_heads": list(config.num_heads),
            "window_size": config.window_size,
            "mlp_ratio": config.mlp_ratio,
            "qkv_bias": config.qkv_bias,
            "num_classes": config.classes,
        }
        if self.cosine:
            kwargs["pretrained_window_sizes"] = list(config.pretrained_window_sizes[: len(config.depths)])
        return Design(self.architecture, kwargs, self.norm_notes(config.layer_norm_eps, 1e-5))

    def require_windows(self, config: SwinConfig) -> None:
        """Raises ModelError unless transformers and timm cut every stage's grid into the same windows.

        Both shrink the windows of a small grid, transformers by one edge for both. Where a grid is no multiple of its
        windows, transformers pads it before it shifts them, and timm after: that is the same only if half a window is padded,
        which the mask of shifted windows parts from the rest.
        """
        edges = tuple(zip(config.image_size, config.patch_size, strict=True))
        if any(edge % patch for edge, patch in edges):
            sizes = f"images of {by(config.image_size)} are no multiple of its patches of {by(config.patch_size)}"
            raise self.refusal(f"its {sizes}, and are padded")
        largest = config.window_size
        for stage, depth in enumerate(config.depths):
            grid = [math.ceil(edge / patch / 2**stage) for edge, patch in edges]
            shrunk_by = edges[0][0] // edges[0][1] // 2**stage if self.cosine else min(grid)
            window, shifts = min(largest, shrunk_by), depth > 1 and shrunk_by > largest
            where = f"the grid of stage {stage + 1} is {by(grid)}, and its windows of {largest}×{largest} are"
            if window < largest and not self.cosine:
                raise self.refusal(f"{where} larger")
            if any(min(edge, largest) != window or (depth > 1 and edge > largest) != shifts for edge in grid):
                raise self.refusal(f"{where} shrunk by one edge for both")
            if shifts and any(edge % window not in (0, window / 2) for edge in grid):
                multiple = [patch * window * 2 ** (len(config.depths) - 1) for patch in config.patch_size]
                raise self.refusal(
                    f"{where} shifted over padding. Images whose edges are multiples of {by(multiple)} need none: set "
                    "image_size in config.json to such a size"
                )

    def finished(self, state: dict[str, Tensor], config: SwinConfig) -> dict[str, Tensor]:  # noqa: ARG002
        out = dict[str, Tensor]()
        for name, tensor in state.items():
            kind, *rest = name.split(".")
            out[".".join(("layers", str(int(rest[0]) + 1), kind, *rest[1:])) if kind == "downsample" else name] = tensor
        return keyless_qkv(out) if self.cosine else joined_qkv(out)


SWIN = SwinLayout("swin", "swin_tiny_patch4_window7_224", cosine=False)
SWINV2 = SwinLayout("swinv2", "swinv2_tiny_window8_256", cosine=True)
