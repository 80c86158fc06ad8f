"""Streaming second moments: mean, covariance and cross-covariance, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.errors import ModelError

WIDE = 1024
"""Width from which only half of a symmetric product is computed, and the other half mirrored."""


class Moments:
    """Weighted E[x], E[x̃x̃ᵀ] and, with a second variable, E[y], E[ỹx̃ᵀ], of rows [n, p].

    What has no bias cannot take up a mean: with `centred=False` all means are 0, and moments are about 0.

    Products are taken in the precision of the rows, around the mean of the first batch so that a large mean costs no
    digits, and summed over batches in float64.
    """

    def __init__(self, *, centred: bool = True) -> None:
        self.centred, self.weight = centred, 0.0
        self._sum = self._square = self._other_sum = self._cross = torch.zeros(())
        self._centre = self._other_centre = torch.zeros(())

    def add(self, x: Tensor, y: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Adds rows x [n, p] and, if given, y [n, q], each counted as often as `weights` [n] says (once if absent)."""
        if len(x) == 0:
            return
        if self.weight == 0:
            self._centre = x.mean(0)
            self._sum = self._square = torch.zeros((), dtype=torch.float64)
            if y is not None:
                self._other_centre = y.mean(0)
                self._other_sum = self._cross = torch.zeros((), dtype=torch.float64)
        self.weight += len(x) if weights is None else float(weights.sum(dtype=torch.float64))
        x = x - self._centre
        counted = x if weights is None else x * weights[:, None]
        self._sum = self._sum + counted.sum(0, dtype=torch.float64)
        self._square = self._square + _symmetric(x, counted).double()
        if y is not None:
            y = y - self._other_centre
            self._cross = self._cross + (y.T @ counted).double()
            y = y if weights is None else y * weights[:, None]
            self._other_sum = self._other_sum + y.sum(0, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """E[x], float64 [p]."""
        mean = self._mean
        return mean if self.centred else torch.zeros_like(mean)

    @property
    def covariance(self) -> Tensor:
        """E[x̃x̃ᵀ] with x̃ = x − E[x], float64 [p, p]."""
        shift = self._sum / self.weight
        covariance = self._square / self.weight - torch.outer(shift, shift)
        return covariance if self.centred else covariance + torch.outer(self._mean, self._mean)

    @property
    def other_mean(self) -> Tensor:
        """E[y], float64 [q]."""
        mean = self._other_mean
        return mean if self.centred else torch.zeros_like(mean)

    @property
    def cross(self) -> Tensor:
        """E[ỹx̃ᵀ], float64 [q, p]."""
        cross = self._cross / self.weight - torch.outer(self._other_sum, self._sum) / self.weight**2
        return cross if self.centred else cross + torch.outer(self._other_mean, self._mean)

    @property
    def _mean(self) -> Tensor:
        return self._centre.double() + self._sum / self.weight

    @property
    def _other_mean(self) -> Tensor:
        return self._other_centre.double() + self._other_sum / self.weight


@dataclass(frozen=True)
class Joined:
    """Moments over several sums together; the attributes are those of `Moments`."""

    weight: float
    mean: Tensor
    covariance: Tensor
    other_mean: Tensor
    cross: Tensor


def joined(parts: Sequence[Moments | Joined]) -> Joined:
    """The moments of all rows of some parts; all of them are about the mean, or none is."""
    weight = sum(part.weight for part in parts)
    shares = [part.weight / weight for part in parts]
    means, others = [part.mean for part in parts], [part.other_mean for part in parts]
    mean = torch.stack([share * each for share, each in zip(shares, means, strict=True)]).sum(0)
    other = torch.stack([share * each for share, each in zip(shares, others, strict=True)]).sum(0)
    covariance, cross = torch.zeros(len(mean), len(mean)).double(), torch.zeros(len(other), len(mean)).double()
    for share, part, own, its in zip(shares, parts, means, others, strict=True):
        covariance += share * (part.covariance + torch.outer(own - mean, own - mean))
        cross += share * (part.cross + torch.outer(its - other, own - mean))
    return Joined(weight, mean, covariance, other, cross)


def _symmetric(x: Tensor, counted: Tensor) -> Tensor:
    """Xᵀ·counted, [p, p], where that is symmetric: wide ones by blocks on and above the diagonal."""
    width = x.shape[1]
    if width < WIDE:
        return x.T @ counted
    product, step = x.new_empty(width, width), -(-width // 8)
    for start in range(0, width, step):
        part = slice(start, start + step)
        product[part, start:] = x[:, part].T @ counted[:, start:]
        product[start:, part] = product[part, start:].T
    return product


def damped(matrix: Tensor, share: float) -> Tensor:
    """The matrix with `share` of its mean diagonal (or a tiny absolute value, if that is 0) added to the diagonal."""
    level = share * float(matrix.diagonal().mean()) or 1e-12
    return matrix + level * torch.eye(len(matrix), dtype=matrix.dtype)


def require_finite(*values: Tensor) -> None:
    """Raises ModelError if something that a model computed is NaN or infinite."""
    if not all(bool(each.isfinite().all()) for each in values):
        raise ModelError(
            "what a layer computes on these images is not finite in float32: check that the model gives finite outputs on them, and that "
            "they are normalised as in its training"
        )


def cholesky(matrix: Tensor, share: float, *, upper: bool = False) -> Tensor:
    """The factor of `damped(matrix, share)`, and of ten times the damping as often as rounding has left too little.

    Products in float32 leave an error of about 1e-7 of the largest variance. Where a few variances are far above the others, that is
    more than a share of the mean makes up for, and the matrix is not positive definite.

    Raises:
        ModelError: the matrix holds values that are not finite.
    """
    require_finite(matrix)
    factor: Tensor
    while True:
        factor, failed = torch.linalg.cholesky_ex(damped(matrix, share), upper=upper)
        if not bool(failed):
            break
        share *= 10
    return factor
