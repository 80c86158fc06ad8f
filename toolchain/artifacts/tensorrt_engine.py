"""An engine of TensorRT or TensorRT for RTX: one opaque file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from toolchain.artifacts.engine import Engine


@dataclass(frozen=True)
class TensorrtEngine(Engine):
    """An engine; what is known of it beyond its bytes is in engine.json."""

    name: ClassVar[str] = "tensorrt-engine"
    word: ClassVar[str] = "TensorRT engine"
    patterns: ClassVar[tuple[str, ...]] = ("*.engine",)
