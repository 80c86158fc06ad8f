"""Captures the input of one residual branch, and of the linears in it. Legend: B images, D width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.data import batches
from toolchain.families import Branch

BATCH = 32


@contextmanager
def captured(module: nn.Module, watched: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Module path → its last input ("in") or output ("out"), for the modules in `watched`."""
    seen: dict[str, Tensor] = {}

    def hook(name: str, side: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0] if side == "in" else output

        return keep

    handles = [module.get_submodule(name).register_forward_hook(hook(name, side)) for name, side in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Raised to end a forward pass as soon as the wanted activation was captured."""


def _entering(model: nn.Module, name: str, run: Callable[[], object]) -> Tensor:
    """What enters a module while `run` runs the model; nothing after it is computed."""
    entered: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        entered.append(inputs[0])
        raise _Stop

    handle = model.get_submodule(name).register_forward_pre_hook(stop)
    try:
        run()
    except _Stop:
        return entered[0]
    finally:
        handle.remove()
    raise AssertionError(f"{name} did not run")


@torch.no_grad()
def first_residual(model: nn.Module, block: str, images: Dataset[tuple[Tensor, int]]) -> list[Tensor]:
    """The residual stream before a block, in batches [B, *, D]."""
    return [_entering(model, block, partial(model, batch)) for batch, _ in batches(images, BATCH)]


def input_of(model: nn.Module, branch: Branch, linear: str, x: Tensor) -> Tensor:
    """What enters a linear of a branch, [G, n, in], laid out as `arranged`; nothing after it is computed."""
    return _entering(model, linear, partial(branch.run, model, x))
