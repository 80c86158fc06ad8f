"""LayerScales, folded into the linear before them."""

from __future__ import annotations

import torch
from torch import nn

from toolchain.families import Branch


@torch.no_grad()
def fold_scale(module: nn.Module, branch: Branch) -> bool:
    """Whether the branch has a LayerScale; it is then moved into the branch's last linear, in place.

    W ← diag(γ)W, b ← γb, γ ← 1: exact, as nothing lies between the two. Of two linears in the place of one it is the
    second, `up`, that is scaled. The ones stay; a caller that ships the model puts an identity in their place.
    """
    gamma, linear = getattr(module.get_submodule(branch.scale), "gamma", None), module.get_submodule(branch.reader)
    if gamma is None:
        return False
    last = linear if isinstance(linear, nn.Linear) else linear.get_submodule("up")
    last.weight.mul_(gamma[:, None])  # type: ignore[operator]
    if last.bias is not None:
        last.bias.mul_(gamma)  # type: ignore[operator]
    gamma.fill_(1)
    return True
