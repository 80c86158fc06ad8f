"""LayerScales, folded into the linear before them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers.layer_scale import LayerScale
from torch import nn

from toolchain.families import Branch
from toolchain.surgery.factorised import replace_module

LEAST_SCALE = 0.01


@torch.no_grad()
def fold_scale(module: nn.Module, branch: Branch) -> bool:
    """Whether the branch has a scale γ; it is then moved into the branch's last linear, in place.

    W ← diag(γ)W, b ← γb, γ ← 1: exact, as nothing lies between the two. Of two linears in the place of one it is the
    second, `up`, that is scaled. The ones stay; a caller that ships the model removes them.
    """
    if branch.scale is None:
        return False
    gamma, linear = module.get_parameter(branch.scale), module.get_submodule(branch.reader)
    last = linear if isinstance(linear, nn.Linear) else linear.get_submodule("up")
    last.weight.mul_(gamma[:, None])  # type: ignore[operator]
    if last.bias is not None:
        last.bias.mul_(gamma)  # type: ignore[operator]
    gamma.fill_(1)
    return True


def fold_scales(module: nn.Module, branches: Iterable[Branch]) -> None:
    """Moves every scale into the linear before it, in place, and leaves ones behind: paths and shapes stay."""
    for branch in branches:
        fold_scale(module, branch)


@torch.no_grad()
def restore_scales(module: nn.Module, dense: nn.Module, branches: Iterable[Branch]) -> None:
    """Gives every scale of ones the values of a dense model again, in place: W ← diag(γ)^{-1}W, b ← γ^{-1}b; exact.

    Training then sees the linears in the size in which they were trained: Adam's steps do not depend on the size of what they
    change, so that they would be far too large for linears that hold a small γ. A γ near 0 counts as a hundredth of their
    root mean square.
    """
    for branch in branches:
        if branch.scale is None:
            continue
        scale, gamma = module.get_parameter(branch.scale), dense.get_parameter(branch.scale)
        least = LEAST_SCALE * float(gamma.square().mean().sqrt())
        if not least:
            continue
        scale.copy_(torch.where(gamma < 0, -1.0, 1.0) * gamma.abs().clamp_min(least))
        linear = module.get_submodule(branch.reader)
        last = linear if isinstance(linear, nn.Linear) else linear.get_submodule("up")
        last.weight.div_(scale[:, None])  # type: ignore[operator]
        if last.bias is not None:
            last.bias.div_(scale)  # type: ignore[operator]


def remove_scale(module: nn.Module, branch: Branch) -> None:
    """Takes a scale of ones away, in place: an identity for a LayerScale, no parameter in a block that holds its own."""
    if branch.scale is None:
        return
    owner, _, name = branch.scale.rpartition(".")
    if isinstance(module.get_submodule(owner), LayerScale):
        replace_module(module, owner, nn.Identity())
    else:
        setattr(module.get_submodule(owner), name, None)
