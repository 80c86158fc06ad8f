"""LayerScales, folded into the linear before them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers.layer_scale import LayerScale
from torch import nn

from toolchain.families import Branch
from toolchain.surgery.factorised import replace_module


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


def remove_scale(module: nn.Module, branch: Branch) -> None:
    """Takes a scale of ones away, in place: an identity for a LayerScale, no parameter in a block that holds its own."""
    if branch.scale is None:
        return
    owner, _, name = branch.scale.rpartition(".")
    if isinstance(module.get_submodule(owner), LayerScale):
        replace_module(module, owner, nn.Identity())
    else:
        setattr(module.get_submodule(owner), name, None)
