"""Fewer tokens: matrices P [N′, N], rows not negative and of sum 1, that put mixtures of patches in the place of patches.

Class and register tokens, which come first, stay as they are. Shapes are static, so that a graph of them has matrix products alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

Grid = tuple[int, int]


def overlap(sides: int, cells: int) -> Tensor:
    """The share of each of `cells` equal parts of a line that each of `sides` equal parts covers; float64 [cells, sides], rows of sum 1."""
    starts = torch.arange(sides, dtype=torch.float64)
    edges = torch.arange(cells + 1, dtype=torch.float64)[:, None] * sides / cells
    shared = torch.minimum(edges[1:], starts + 1) - torch.maximum(edges[:-1], starts)
    shared = shared.clamp_min(0)
    return shared / shared.sum(1, keepdim=True)


@dataclass(frozen=True)
class Mixture:
    """What replaces the tokens of one block's input.

    Attributes:
        prefix: tokens that stay.
        typical: float32 [N′, N], what P is on average, where nothing is known of the tokens: it has P's shape, and weighs what readers
            care about.
    """

    prefix: int
    typical: Tensor = field(repr=False)

    def matrix(self, x: Tensor) -> Tensor:
        """P [B, N′, N] or [N′, N] of a stream x [B, N, D]."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """P x."""
        return (self.typical.to(x.device) if x.is_meta else self.matrix(x)) @ x

    def _whole(self, mixed: Tensor) -> Tensor:
        """P for patches [B, n′, n] with the tokens that stay."""
        count, cells, patches = mixed.shape
        whole = mixed.new_zeros(count, self.prefix + cells, self.prefix + patches)
        whole[:, : self.prefix, : self.prefix] = torch.eye(self.prefix, dtype=mixed.dtype)
        whole[:, self.prefix :, self.prefix :] = mixed
        return whole

    def alike(self, x: Tensor) -> Tensor:
        """The patches of a stream as vectors of length 1 whose products are similarities; [B, n, D]."""
        return functional.normalize(functional.layer_norm(x[:, self.prefix :], x.shape[-1:]), dim=-1)


def area(grid: Grid, cells: Grid, prefix: int) -> Tensor:
    """float32 [prefix + n′, prefix + n]: each cell of a coarser grid is the mean of the patches below it, by the area that they share."""
    mixed = torch.kron(overlap(grid[0], cells[0]), overlap(grid[1], cells[1]))
    return torch.block_diag(torch.eye(prefix, dtype=torch.float64), mixed).float()


class Mean(Mixture):
    """The mean of each cell."""

    def matrix(self, x: Tensor) -> Tensor:  # noqa: ARG002
        return self.typical


@dataclass(frozen=True)
class Soft(Mixture):
    """softmax of `sharpness` times the cosine between a patch and the mean of a cell, plus the logarithm of the area that they share."""

    sharpness: float = 5.0

    def matrix(self, x: Tensor) -> Tensor:
        shares, patches = self.typical[self.prefix :, self.prefix :], self.alike(x)
        centres = functional.normalize(shares @ patches, dim=-1)
        return self._whole((self.sharpness * centres @ patches.mT + shares.log()).softmax(-1))


class Matching(Mixture):
    """Every second patch goes to the one among the others that is most like it: as many as are wanted, most alike first."""

    def matrix(self, x: Tensor) -> Tensor:
        patches, left = self.alike(x), len(self.typical) - self.prefix
        count = patches.shape[1]
        staying, leaving = torch.arange(0, count, 2), torch.arange(1, count, 2)
        best, to = (patches[:, leaving] @ patches[:, staying].mT).max(-1)
        order = best.argsort(dim=1, descending=True, stable=True)
        gone, kept = order[:, : count - left], order[:, count - left :].sort().values
        target = torch.empty(len(x), count, dtype=torch.long)
        target[:, staying] = torch.arange(len(staying))
        target.scatter_(1, leaving[gone], to.gather(1, gone))
        target.scatter_(1, leaving[kept], len(staying) + torch.arange(kept.shape[1]).expand_as(kept))
        members = functional.one_hot(target, left).mT.to(x)
        return self._whole(members / members.sum(-1, keepdim=True))


def matching(patches: int, left: int, prefix: int) -> Matching:
    """A matching that leaves so many patches; of how it merges, nothing is known beforehand."""
    if not patches - patches // 2 <= left <= patches:
        raise ValueError(f"a matching of {patches} patches leaves {patches - patches // 2} to {patches}, not {left}")
    mixed = torch.full((left, patches), 1 / patches)
    return Matching(prefix, torch.block_diag(torch.eye(prefix), mixed))


def mixed(module: nn.Module, blocks: list[str], mixtures: Mapping[int, Callable[[Tensor], Tensor]]) -> nn.Module:
    """The module, whose blocks of these numbers are given mixtures of what they were given, from now on."""
    for index, mixture in mixtures.items():
        module.get_submodule(blocks[index]).register_forward_pre_hook(
            lambda _, inputs, mixture=mixture: (mixture(inputs[0]), *inputs[1:])
        )
    return module
