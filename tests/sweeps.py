"""Which of many cases a default run takes: some of each kind. All others are marked slow, and `make test-slow` takes them too."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

USUAL = frozenset(
    (
        *("classic", "distilled", "registers", "packed SwiGLU", "q/k norm", "no qkv bias"),
        *("Swin, padded windows", "Swin, narrow heads", "Swin V2, of smaller windows"),
        *("EVA-02 base", "DINOv3 with biases", "RoPE-ViT mixed", "grouped queries"),
        *(
            "post-norm",
            "parallel",
            "parallel scaling, normed",
            "differential, parallel",
            "attention pool over registers",
        ),
        *("relative position MLP", "BEiT shared", "NaFlex gated", "hybrid"),
    )
)
"""Structures with every kind of block, position, norm, stem and way out between them; others combine these anew."""

FEW = frozenset(
    (
        *("distilled", "Swin V2, of smaller windows", "RoPE-ViT mixed", "grouped queries", "parallel"),
        *("differential, parallel", "attention pool over registers", "BEiT shared", "NaFlex gated", "hybrid"),
    )
)
"""Those for what takes seconds for each."""


def swept(cases: Iterable[Any], usual: Collection[Any] = USUAL) -> list[Any]:
    """The cases as values of one parameter of a test, of which those that are not `usual` are slow."""
    return [case if case in usual else pytest.param(case, marks=pytest.mark.slow) for case in cases]
