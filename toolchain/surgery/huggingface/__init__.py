"""Layouts of Hugging Face transformers: one file here and one line in `LAYOUTS` per model_type, or an object of another package."""

from __future__ import annotations

from typing import Any

from toolchain.registry import Registry
from toolchain.surgery.huggingface.layout import Layout

_HERE = "toolchain.surgery.huggingface"
LAYOUTS: Registry[Layout[Any]] = Registry(
    "model_type",
    "slimvit.huggingface",
    {
        "vit": f"{_HERE}.vit:VIT",
        "vit_mae": f"{_HERE}.vit:VIT_MAE",
        "deit": f"{_HERE}.deit:DEIT",
        "beit": f"{_HERE}.beit:BEIT",
        "dinov2": f"{_HERE}.dinov2:DINOV2",
        "dinov2_with_registers": f"{_HERE}.dinov2:DINOV2_WITH_REGISTERS",
        "dinov3_vit": f"{_HERE}.dinov3:DINOV3",
        "clip_vision_model": f"{_HERE}.clip:CLIP_VISION",
        "clip": f"{_HERE}.clip:CLIP",
        "siglip_vision_model": f"{_HERE}.siglip:SIGLIP_VISION",
        "siglip": f"{_HERE}.siglip:SIGLIP",
        "siglip2_vision_model": f"{_HERE}.siglip2:SIGLIP2_VISION",
        "siglip2": f"{_HERE}.siglip2:SIGLIP2",
        "swin": f"{_HERE}.swin:SWIN",
        "swinv2": f"{_HERE}.swin:SWINV2",
    },
)
