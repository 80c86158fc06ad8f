"""One residual branch at a time: running it, watching it, and folding its scale.

Legend: B images, N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.data import batches
from toolchain.families import Branch
from toolchain.surgery.scales import fold_scale

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
    """Ends a forward pass once what is wanted is known."""


def _entering(model: nn.Module, name: str, run: Callable[[], object]) -> Tensor:
    """What enters a module while `run` runs the model; nothing after it is computed."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Stop

    handle = model.get_submodule(name).register_forward_pre_hook(stop)
    try:
        run()
    except _Stop:
        return found[0]
    finally:
        handle.remove()
    raise AssertionError(f"{name} did not run")


@torch.no_grad()
def first_residual(model: nn.Module, block: str, images: Dataset[tuple[Tensor, int]]) -> list[Tensor]:
    """The residual stream before a block, in batches [B, N, D]."""
    return [_entering(model, block, partial(model, batch)) for batch, _ in batches(images, BATCH)]


def input_of(model: nn.Module, branch: Branch, linear: str, x: Tensor) -> Tensor:
    """What enters a linear of a branch, [B, N, in]; nothing after it is computed."""
    return _entering(model, linear, partial(run_branch, model, branch, x))


def run_branch(model: nn.Module, branch: Branch, x: Tensor) -> Tensor:
    """γ · module(norm(x)), [B, N, D]: what the branch adds to the residual stream."""
    y: Tensor = model.get_submodule(branch.module)(model.get_submodule(branch.norm)(x), **branch.context(model))
    return y if branch.scale is None else y * model.get_parameter(branch.scale)


def fold_scales(model: nn.Module, branches: Iterable[Branch]) -> None:
    """Moves every scale into the linear before it, in place, and leaves ones behind: paths and shapes stay."""
    for branch in branches:
        fold_scale(model, branch)
