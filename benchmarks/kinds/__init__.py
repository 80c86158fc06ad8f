"""What a cell of a suite can be: one file each, which says what the cell is, how it is carried out, and what is recorded.

A kind of another package is registered by its entry point, or by `KINDS.add`.
"""

from __future__ import annotations

from typing import Any

from kinds.base import Kind
from toolchain.registry import Registry

KINDS: Registry[Kind[Any, Any]] = Registry(
    "kind of cell",
    "slimvit.benchmark_kinds",
    {
        "compression": "kinds.compression:KIND",
        "peer": "kinds.peer:KIND",
        "cost": "kinds.cost:KIND",
        "pair": "kinds.pair:KIND",
        "floor": "kinds.floor:KIND",
        "files": "kinds.files:KIND",
        "sizes": "kinds.sizes:KIND",
        "trial": "kinds.trial:KIND",
        "backbone": "kinds.backbone:KIND",
    },
)
