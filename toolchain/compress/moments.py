"""Streaming second moments: mean, covariance and cross-covariance, accumulated in float64 batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """E[x], E[xxᵀ] and, with a second variable, E[y], E[yxᵀ], of rows [n, width]."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._square = self._other_sum = self._cross = torch.zeros(())

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Adds rows x [n, p] and, if given, y [n, q]."""
        x = x.double()
        first = self.count == 0
        self.count += len(x)
        self._sum = x.sum(0) if first else self._sum + x.sum(0)
        self._square = x.T @ x if first else self._square + x.T @ x
        if y is not None:
            y = y.double()
            self._other_sum = y.sum(0) if first else self._other_sum + y.sum(0)
            self._cross = y.T @ x if first else self._cross + y.T @ x

    @property
    def mean(self) -> Tensor:
        """E[x], [p]."""
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """E[x̃x̃ᵀ] with x̃ = x − E[x], [p, p]."""
        return self._square / self.count - torch.outer(self.mean, self.mean)

    @property
    def other_mean(self) -> Tensor:
        """E[y], [q]."""
        return self._other_sum / self.count

    @property
    def cross(self) -> Tensor:
        """E[ỹx̃ᵀ], [q, p]."""
        return self._cross / self.count - torch.outer(self.other_mean, self.mean)


def damped(matrix: Tensor, share: float) -> Tensor:
    """The matrix with `share` of its mean diagonal (or a tiny absolute value, if that is 0) added to the diagonal."""
    level = share * float(matrix.diagonal().mean()) or 1e-12
    return matrix + level * torch.eye(len(matrix), dtype=matrix.dtype)
