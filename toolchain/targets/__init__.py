"""Targets: a new one is a new file here and one entry in `TARGETS`."""

from __future__ import annotations

import difflib

from toolchain.errors import RecipeError
from toolchain.targets.base import (
    BuildOptions,
    EngineBuild,
    Feeds,
    NodeTime,
    Profiled,
    Refittable,
    Runner,
    Selective,
    Target,
    TargetInfo,
    TargetProfile,
)
from toolchain.targets.eager import EAGER
from toolchain.targets.gpu import EVERY_MODE, Mode
from toolchain.targets.openvino_cpu import OPENVINO_CPU, OPENVINO_CPU_BF16
from toolchain.targets.ort import ORT_CPU
from toolchain.targets.ort_cuda import ORT_CUDA
from toolchain.targets.trt import TRT, TRT_RTX

TARGETS: dict[str, Target] = {
    target.name: target for target in (ORT_CPU, EAGER, OPENVINO_CPU, OPENVINO_CPU_BF16, ORT_CUDA, TRT, TRT_RTX)
}


def _on_gpu(mode: Mode) -> tuple[Target, ...]:
    return ORT_CUDA.in_mode(mode), TRT.in_mode(mode), TRT_RTX.in_mode(mode)


MODES: dict[str, Target] = {target.name: target for mode in EVERY_MODE for target in _on_gpu(mode)}
"""GPU targets in each mode in which calls are timed: "trt", "trt+graph", "trt+graph+events" and so on."""


def get_target(name: str) -> Target:
    """The target of a name; raises RecipeError with the nearest name if there is none."""
    if (known := TARGETS.get(name) or MODES.get(name)) is not None:
        return known
    near = difflib.get_close_matches(name, [*TARGETS, *MODES], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known targets: {', '.join(TARGETS)}"
    raise RecipeError(f"unknown target {name!r}; {hint}")


__all__ = [
    "MODES",
    "TARGETS",
    "BuildOptions",
    "EngineBuild",
    "Feeds",
    "NodeTime",
    "Profiled",
    "Refittable",
    "Runner",
    "Selective",
    "Target",
    "TargetInfo",
    "TargetProfile",
    "get_target",
]
