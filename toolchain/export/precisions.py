"""The registry of precisions; each is imported on first use, so that listing names is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.registry import Registry

if TYPE_CHECKING:
    from toolchain.export.precision import Precision

PRECISIONS: Registry[Precision] = Registry(
    "precision",
    "slimvit.precisions",
    {
        "fp16": "toolchain.export.precision:FP16",
        "bf16": "toolchain.export.precision:BF16",
        "int8-dynamic": "toolchain.export.precision:INT8_DYNAMIC",
        "int8-qdq": "toolchain.export.precision:INT8_QDQ",
        "int4": "toolchain.export.precision:INT4",
    },
)
MADE_FOR_NOISE = (
    "The file was made for seeded noise, as there are no pictures: its bytes and times hold, its outputs for pictures may be far off. "
    "Name pictures in data.source before you ship it."
)
"""Note on a file that was calibrated on noise."""
