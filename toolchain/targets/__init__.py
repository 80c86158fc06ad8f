"""Targets: a new one is a new file here and one entry in `TARGETS`."""

from __future__ import annotations

import difflib

from toolchain.errors import RecipeError
from toolchain.targets.base import (
    BuildOptions,
    EngineBuild,
    Feeds,
    Runner,
    Target,
    TargetInfo,
    TargetProfile,
)
from toolchain.targets.eager import EAGER
from toolchain.targets.ort import ORT_CPU
from toolchain.targets.trt import TRT, TRT_RTX

TARGETS: dict[str, Target] = {target.name: target for target in (ORT_CPU, EAGER, TRT, TRT_RTX)}


def get_target(name: str) -> Target:
    """The target of a name; raises RecipeError with the nearest name if there is none."""
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known targets: {', '.join(TARGETS)}"
    raise RecipeError(f"unknown target {name!r}; {hint}")


__all__ = [
    "TARGETS",
    "BuildOptions",
    "EngineBuild",
    "Feeds",
    "Runner",
    "Target",
    "TargetInfo",
    "TargetProfile",
    "get_target",
]
