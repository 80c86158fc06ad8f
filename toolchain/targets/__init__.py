"""Targets: a new one is a new file here and one line in `TARGETS`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import cast

from toolchain.registry import Registry
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
    Timed,
)
from toolchain.targets.mode import EVERY_MODE, Mode

TARGETS: Registry[Target] = Registry(
    "target",
    "slimvit.targets",
    {
        "ort-cpu": "toolchain.targets.ort:ORT_CPU",
        "eager": "toolchain.targets.eager:EAGER",
        "openvino-cpu": "toolchain.targets.openvino_cpu:OPENVINO_CPU",
        "openvino-cpu-bf16": "toolchain.targets.openvino_cpu:OPENVINO_CPU_BF16",
        "ort-cuda": "toolchain.targets.ort_cuda:ORT_CUDA",
        "trt": "toolchain.targets.tensorrt.target:TRT",
        "trt-rtx": "toolchain.targets.tensorrt.target:TRT_RTX",
    },
)
ON_GPU = ("ort-cuda", "trt", "trt-rtx")
MODES: Mapping[str, tuple[str, Mode]] = {name + mode.suffix: (name, mode) for mode in EVERY_MODE for name in ON_GPU}
"""GPU targets in each mode in which calls are timed ("trt", "trt+graph", "trt+graph+events"), and what they consist of."""


def get_target(name: str) -> Target:
    """The target of a name; raises RecipeError with the nearest name if there is none."""
    return _in_mode(name) if name in MODES and name not in TARGETS else TARGETS.require(name)


@cache
def _in_mode(name: str) -> Target:
    base, mode = MODES[name]
    return cast("Timed", TARGETS[base]).in_mode(mode)


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
