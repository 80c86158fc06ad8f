"""One training in several processes, as `torchrun` starts them; in one process everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn

from toolchain.errors import RecipeError


def started() -> int:
    """The number of processes that the launcher started together, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def accelerator() -> Accelerator:
    """What runs a training: the GPU of this process, or the CPU where there is none.

    Raises:
        RecipeError: several processes were started, and accelerate joins another number of them (on a device whose
            processes it cannot join, each would train a model of its own without a word).
    """
    # Without cpu=True accelerate joins no processes that have no GPU.
    made = Accelerator(cpu=not torch.accelerator.is_available())
    if made.num_processes != started():
        raise RecipeError(
            f"{started()} processes were started (WORLD_SIZE), but {made.num_processes} would train together on "
            f"{made.device.type!r}; start one process, or use torchrun with NVIDIA GPUs or CPUs"
        )
    return made


@contextmanager
def together() -> Iterator[bool]:
    """Whether this process is the one that writes and speaks; when the block ends, the processes part.

    In the block each process does the same; `fit` shares the work.

    Raises:
        RecipeError: as `accelerator`.
    """
    try:
        yield accelerator().is_main_process
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def require_one(what: str) -> None:
    """Raises RecipeError if several processes were started for something that one process does."""
    if started() > 1:
        raise RecipeError(
            f"{what} runs in one process, and {started()} were started; only fine-tuning runs in several: "
            f"first `slimvit run RECIPE --set finetune.epochs=0 --out DIR`, then `torchrun --nproc_per_node {started()} "
            "-m toolchain finetune DIR/masked --recipe RECIPE --teacher DIR/dense --out DIR-finetuned`"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of what `accelerate` wraps around it to train it in several processes."""
    inner: nn.Module = extract_model_from_parallel(model)
    return inner
