"""Targets: a new one is a new file here and one line in `WHERE`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import cast

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
    Timed,
)
from toolchain.targets.mode import EVERY_MODE, Mode

WHERE: Mapping[str, tuple[str, str]] = {
    "ort-cpu": ("ort", "ORT_CPU"),
    "eager": ("eager", "EAGER"),
    "openvino-cpu": ("openvino_cpu", "OPENVINO_CPU"),
    "openvino-cpu-bf16": ("openvino_cpu", "OPENVINO_CPU_BF16"),
    "ort-cuda": ("ort_cuda", "ORT_CUDA"),
    "trt": ("tensorrt.target", "TRT"),
    "trt-rtx": ("tensorrt.target", "TRT_RTX"),
}
"""Name → file here and what the target is called in it."""
ON_GPU = ("ort-cuda", "trt", "trt-rtx")


class Table(MutableMapping[str, Target]):
    """Targets by name, each imported when it is asked for: a process that times one holds no other's runtime in memory."""

    def __init__(self, found: Mapping[str, Callable[[], Target]]) -> None:
        self._find: dict[str, Callable[[], Target]] = dict(found)
        self._found: dict[str, Target] = {}

    def __getitem__(self, name: str) -> Target:
        if name not in self._found:
            self._found[name] = self._find[name]()
        return self._found[name]

    def __setitem__(self, name: str, target: Target) -> None:
        self._find[name] = lambda: target
        self._found[name] = target

    def __delitem__(self, name: str) -> None:
        del self._find[name]
        self._found.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._find

    def __iter__(self) -> Iterator[str]:
        return iter(self._find)

    def __len__(self) -> int:
        return len(self._find)


def _imported(file: str, name: str) -> Target:
    return cast("Target", getattr(importlib.import_module(f"toolchain.targets.{file}"), name))


def _in_mode(name: str, mode: Mode) -> Target:
    return cast("Timed", TARGETS[name]).in_mode(mode)


TARGETS = Table({name: partial(_imported, *where) for name, where in WHERE.items()})
MODES = Table({name + mode.suffix: partial(_in_mode, name, mode) for mode in EVERY_MODE for name in ON_GPU})
"""GPU targets in each mode in which calls are timed: "trt", "trt+graph", "trt+graph+events" and so on."""


def get_target(name: str) -> Target:
    """The target of a name; raises RecipeError with the nearest name if there is none."""
    for table in (TARGETS, MODES):
        if name in table:
            return table[name]
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
