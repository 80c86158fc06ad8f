"""Optimal brain surgeon on feed-forward neurons: which to remove, and how the rest takes over.

Hassibi & Stork 1993; for structures Kurtic et al. 2023 (ZipLM, arXiv 2302.04089). Legend: M hidden neurons, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolchain.compress.moments import Joined, Moments, cholesky, damped

BLOCK = 16
"""Neurons that are removed at once: at least this many, in wide layers a 64th."""
DAMPING = 1e-4


@dataclass(frozen=True)
class Elimination:
    """The order in which all neurons are removed, and the damage after each.

    Attributes:
        order: neurons in the order of their removal, [M].
        damage: damage[m] is E‖Δy‖² of the re-fitted output with m neurons removed, [M + 1].
    """

    order: Tensor
    damage: Tensor

    def kept(self, width: int) -> Tensor:
        """The neurons that are left at a width, ascending."""
        return self.order[len(self.order) - width :].sort().values


def eliminate(weight: Tensor, covariance: Tensor) -> Elimination:
    """Removes neurons one after another, each time those whose loss the others can best make up for.

    With H = C^{-1} and W re-fitted all along, removing j costs ‖W_:j‖²/H_jj; then W −= W_:j H_j:/H_jj and
    H −= H_:j H_j:/H_jj. Done in blocks of the cheapest: W −= W_P (H_PP)^{-1} H_P:, H −= H_:P (H_PP)^{-1} H_P:.

    Args:
        weight: W of the linear that reads the neurons, [D, M].
        covariance: C = Cov(h), [M, M].
    """
    count = weight.shape[1]
    weight = weight.double().clone()
    inverse = torch.cholesky_inverse(cholesky(covariance.double(), DAMPING))
    names = torch.arange(count)  # which neuron each column is, as columns that are gone are dropped now and then
    alive = torch.ones(count, dtype=torch.bool)
    order, damage, left, step = [], [0.0], count, max(BLOCK, count // 64)
    while left > 0:
        if left <= len(alive) // 2:
            names, weight, inverse = names[alive], weight[:, alive], inverse[alive][:, alive]
            alive = torch.ones(left, dtype=torch.bool)
        scores = weight.square().sum(0) / inverse.diagonal().clamp_min(1e-300)
        scores[~alive] = torch.inf
        size = min(step if left > 4 * step else 1, left)
        chosen = scores.sort(stable=True).indices[:size]
        block, removed = inverse[chosen][:, chosen], weight[:, chosen]
        update = torch.linalg.solve(block, inverse[chosen])  # [P, M]
        cost = float((torch.linalg.solve(block, removed.T) * removed.T).sum())
        weight.addmm_(removed, update, alpha=-1)
        inverse.addmm_(inverse[:, chosen], update, alpha=-1)
        alive[chosen] = False
        weight[:, chosen] = inverse[:, chosen] = 0
        inverse[chosen] = 0
        order += names[chosen].tolist()
        damage += [damage[-1] + cost * (index + 1) / size for index in range(size)]
        left -= size
    return Elimination(torch.tensor(order), torch.tensor(damage, dtype=torch.float64))


def predict_removed(weight: Tensor, covariance: Tensor, mean: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """(W' [D, M], zero outside `kept`; the change of the bias [D]): the kept neurons predict the removed ones.

    B = C_PS (C_SS + λI)^{-1}, W' = W_S + W_P B, b' = b + W_P (μ_P − B μ_S).
    """
    weight, covariance, mean = weight.double(), covariance.double(), mean.double()
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[kept] = False
    factor = cholesky(covariance[kept][:, kept], DAMPING)
    predict = torch.cholesky_solve(covariance[kept][:, gone], factor).T  # [P, S]
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = weight[:, kept] + weight[:, gone] @ predict
    return fitted, weight[:, gone] @ (mean[gone] - predict @ mean[kept])


def anchored_refit(
    weight: Tensor, bias: Tensor | None, moments: Moments | Joined, damping: float
) -> tuple[Tensor, Tensor]:
    """(W', b') that take up the error e = y_t − (W₀x + b₀) which is left: a ridge step away from W₀, not from zero.

    ΔW = E[(e − ē)x̃ᵀ] (E[x̃x̃ᵀ] + λI)^{-1}, W' = W₀ + ΔW, b' = b₀ + ē − ΔW μ. If there is no error, nothing moves.

    Args:
        weight: W₀ [D, p].
        bias: b₀ [D]; None for zeros.
        moments: of x [p] and e [D].
        damping: λ as a share of the mean variance of x.
    """
    delta = torch.linalg.solve(damped(moments.covariance, damping), moments.cross.T).T
    before = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return weight.double() + delta, before + moments.other_mean - delta @ moments.mean
