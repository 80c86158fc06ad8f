"""Targets: a new one is a new file here and one line in `TARGETS`, or an entry point "slimvit.targets" of another package."""

from __future__ import annotations

from collections.abc import Callable

from toolchain.errors import RecipeError
from toolchain.on_device.runner import Runner
from toolchain.registry import Registry
from toolchain.targets.base import (
    BuildOptions,
    EngineBuild,
    Feeds,
    Interpreted,
    NodeTime,
    Profiled,
    Refittable,
    Selective,
    Target,
    TargetInfo,
    TargetProfile,
)

TARGETS: Registry[Target] = Registry(
    "target",
    "slimvit.targets",
    {
        "ort-cpu": "toolchain.targets.ort:ORT_CPU",
        "coreml": "toolchain.targets.coreml:COREML",
        "eager": "toolchain.targets.eager:EAGER",
        "openvino-cpu": "toolchain.targets.openvino_cpu:OPENVINO_CPU",
        "openvino-cpu-bf16": "toolchain.targets.openvino_cpu:OPENVINO_CPU_BF16",
        "executorch-xnnpack": "toolchain.targets.executorch.target:EXECUTORCH_XNNPACK",
        "litert-cpu": "toolchain.targets.litert.target:LITERT_CPU",
        "ort-cuda": "toolchain.targets.ort_cuda:ORT_CUDA",
        "ncnn": "toolchain.targets.ncnn.target:NCNN",
        "ort-web": "toolchain.targets.ort_web.target:ORT_WEB",
        "trt": "toolchain.targets.tensorrt.target:TRT",
        "trt-rtx": "toolchain.targets.tensorrt.target:TRT_RTX",
    },
)
"""Each is imported when it is asked for: a process that times one holds no other's runtime in memory."""


def get_target(name: str) -> Target:
    """The target of a name, which may end in a mode ("trt+graph"); raises RecipeError with the nearest name if there is none."""
    base, plus, mode = name.partition("+")
    target = TARGETS.require(base)
    if not plus:
        return target
    chosen = next((each for each in target.modes if each.suffix == plus + mode), None)
    if chosen is None:
        modes = ", ".join(base + each.suffix for each in target.modes if each.suffix) or "none"
        raise RecipeError(f"target {base!r} has no mode {mode!r}; there are {modes}")
    return target.in_mode(chosen)


def is_target(name: str) -> bool:
    """Whether a target has this name."""
    base, plus, mode = name.partition("+")
    return base in TARGETS and (not plus or plus + mode in [each.suffix for each in TARGETS[base].modes])


def named(which: Callable[[Target], bool]) -> str:
    """The names of some of the targets as words: "a, b and c"."""
    *others, end = [name for name, target in TARGETS.items() if which(target)]
    return f"{', '.join(others)} and {end}" if others else end


__all__ = [
    "TARGETS",
    "BuildOptions",
    "EngineBuild",
    "Feeds",
    "Interpreted",
    "NodeTime",
    "Profiled",
    "Refittable",
    "Runner",
    "Selective",
    "Target",
    "TargetInfo",
    "TargetProfile",
    "get_target",
    "is_target",
    "named",
]
