"""A linear as a product of two, and where the rows and columns of either form lie."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class FactorisedLinear(nn.Sequential):
    """y = up(down(x)) + bias, with down [r, in] and up [out, r]: a low-rank linear whose factors are trained.

    It is an `nn.Sequential` so that splitting it changes its type and nothing else: names and weights stay.
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        down, up = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias)
        super().__init__(OrderedDict(down=down, up=up))

    @staticmethod
    def like(linear: nn.Linear, rank: int) -> FactorisedLinear:
        """A factorised linear of the same shape, dtype and device with unset factors."""
        with torch.device("meta"):  # no memory, no random numbers for values that are never read
            pair = FactorisedLinear(linear.in_features, linear.out_features, rank, bias=linear.bias is not None)
        return pair.to(linear.weight.dtype).to_empty(device=linear.weight.device)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The one linear of weight up·down (multiplied in float64)."""
        with torch.device("meta"):
            linear = nn.Linear(self.down.in_features, self.up.out_features, bias=self.up.bias is not None)
        linear = linear.to(self.up.weight.dtype).to_empty(device=self.up.weight.device)
        linear.weight.copy_(self.up.weight.double() @ self.down.weight.double())
        if self.up.bias is not None:
            linear.bias.copy_(self.up.bias)
        return linear


def side(module: nn.Module, linear: str, axis: int) -> tuple[str, nn.Linear]:
    """(path, linear) of the plain `nn.Linear` that holds one axis: up holds the outputs (0), down the inputs (1)."""
    found = module.get_submodule(linear)
    if isinstance(found, FactorisedLinear):
        part = "up" if axis == 0 else "down"
        return f"{linear}.{part}", found.get_submodule(part)  # type: ignore[return-value]
    if not isinstance(found, nn.Linear):
        raise TypeError(f"{linear} is a {type(found).__name__}, expected a linear")
    return linear, found


def replace_module(root: nn.Module, path: str, new: nn.Module) -> None:
    """Puts `new` at `path` inside `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, new.train(root.training))
