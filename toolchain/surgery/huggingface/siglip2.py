"""SigLIP 2 with native aspect ratios (NaFlex) at one size: the square image that its table of positions is for.

Tschannen et al. 2025, arXiv 2502.14786.
"""

from __future__ import annotations

import math

from pydantic import model_validator
from torch import Tensor

from toolchain.surgery.anatomy import by
from toolchain.surgery.huggingface.layout import Design, pair
from toolchain.surgery.huggingface.siglip import SiglipConfig, SiglipLayout
from toolchain.surgery.resampling import Resampling


class Siglip2Config(SiglipConfig):
    """A config.json of SigLIP 2's image tower; its images have the size that makes `num_patches` patches of a square."""

    num_patches: int = 256

    @model_validator(mode="before")
    @classmethod
    def _square(cls, values: dict[str, object]) -> dict[str, object]:
        patch, count = pair(values.get("patch_size", 16)), values.get("num_patches", 256)
        if not (isinstance(count, int) and count > 0 and len(patch) == 2 and all(isinstance(n, int) for n in patch)):
            return values  # which the fields refuse
        return {**values, "image_size": tuple(edge * math.isqrt(count) for edge in patch)}


class Siglip2Layout(SiglipLayout):
    """Patches are pixels in a row there, and a convolution here."""

    config = Siglip2Config
    processor = "Siglip2"
    resampling = Resampling("bilinear", antialias=True)

    def design(self, config: SiglipConfig) -> Design:
        assert isinstance(config, Siglip2Config)
        if math.isqrt(config.num_patches) ** 2 != config.num_patches:
            raise self.refusal(f"its {config.num_patches} positions are those of no square image")
        design = super().design(config)
        size = by(config.image_size)
        note = f"It takes images of any shape; here it takes those of {size} pixels (model.kwargs.img_size sets another size)."
        return Design(design.architecture, design.kwargs, (*design.notes, note))

    def finished(self, state: dict[str, Tensor], config: SiglipConfig) -> dict[str, Tensor]:
        state = super().finished(state, config)
        height, width = config.patch_size
        rows = state["patch_embed.proj.weight"]  # [D, height × width × C]
        state["patch_embed.proj.weight"] = rows.reshape(-1, height, width, config.num_channels).permute(0, 3, 1, 2)
        return state


SIGLIP2_VISION = Siglip2Layout("siglip2_vision_model")
SIGLIP2 = Siglip2Layout("siglip2", "vision_config")
