"""Eager PyTorch on the CPU, on a saved model folder: what a user has before any export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

from toolchain.model import IMAGE
from toolchain.on_device.runner import Runner, cpu_model, time_calls_ns
from toolchain.targets.base import Arrays, Feeds, Target, TargetInfo, TargetProfile


class EagerRunner:
    """A model folder as an eager module; input "image" [B, C, H, W], outputs by the names of `outputs.output_names`.

    Torch's thread count is global to the process: set on entry, put back on exit.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self._module: nn.Module | None = None
        self._names: tuple[str, ...] = ()
        self._threads_before = 0

    def __enter__(self) -> Self:
        from toolchain.surgery.replay import load_model

        model = load_model(self.path)
        self._module, self._names = model.module, model.output_names
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads_before)
        self._module = None

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call."""
        outputs = self._call(feeds)
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        return {name: part.numpy() for name, part in zip(self._names, parts, strict=True)}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds; arrays enter and leave torch without a copy."""
        return time_calls_ns(self._call, feeds, samples)

    def _call(self, feeds: Feeds) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self._module is None:
            raise RuntimeError("EagerRunner is used outside its `with` block")
        with torch.inference_mode():
            outputs: torch.Tensor | tuple[torch.Tensor, ...] = self._module(torch.from_numpy(feeds[IMAGE]))
        return outputs


class Eager(Target):
    """Target "eager"; it has no preferred multiples and builds nothing."""

    name = "eager"
    profile = TargetProfile()
    takes = ("model-folder",)
    measures = True

    def probe(self) -> TargetInfo:
        """The runtime and the CPU; always there, since torch is a dependency."""
        return TargetInfo(self.name, "torch", str(torch.__version__), cpu_model())

    def _open(self, path: Path, threads: int) -> Runner:
        """A runner of a model folder; raises ArtifactError on entry if it is none."""
        return EagerRunner(path, threads)


EAGER = Eager()
