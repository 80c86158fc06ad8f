"""Filters that resample a table of positions or a patch embedding to another grid."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Resampling:
    """A filter of `torch.nn.functional.interpolate`.

    Attributes:
        mode: its name.
        antialias: whether it is widened where the grid shrinks.
    """

    mode: str = "bicubic"
    antialias: bool = True


TIMM = Resampling()
"""What timm resamples with."""
FLEXIBLE = Resampling("bilinear", antialias=False)
"""What weights that were trained at many sizes, such as FlexiViT's, were resampled with."""
