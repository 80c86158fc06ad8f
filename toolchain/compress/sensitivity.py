"""How much the output cares about each branch: which directions of what it adds, and at which tokens.

The Fisher information of the model's own predictions, factored as in K-FAC (Martens & Grosse 2015, arXiv 1503.05671):
an error Δy of a branch costs about ½ Σ_n ω_n Δy_nᵀ G Δy_n nats, G = E[g gᵀ], g the gradient of log p(ŷ) with ŷ drawn from
the model itself, by the likelihood of its outputs. No label is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.compress.moments import damped
from toolchain.data import Images, batches
from toolchain.families import Family
from toolchain.likelihood import Likelihood

BATCH = 8  # a backward pass holds what every block computed
DAMPING = 0.05
"""Share of the mean curvature that every direction has at least: few images do not see all that matters."""
FLOOR = 0.1
"""Share of the mean weight that every token has at least, for the same reason: one row per image is too few."""


@dataclass(frozen=True)
class Sensitivity:
    """Of one branch.

    Attributes:
        root: L with LLᵀ = G up to a factor, symmetric, float64 [D, D].
        inverse_root: L^{-1}.
        tokens: ω, mean 1, float64 [N].
    """

    root: Tensor
    inverse_root: Tensor
    tokens: Tensor

    @staticmethod
    def of(gradients: Tensor, tokens: Tensor) -> Sensitivity:
        """From Σ g gᵀ [D, D] and Σ ‖g‖² per token [N], each damped."""
        mean = float(gradients.diagonal().mean())
        if mean <= 0:
            return Sensitivity.flat(len(gradients), len(tokens))
        values, vectors = torch.linalg.eigh(damped(gradients / mean, DAMPING))
        root, inverse = ((vectors * values.pow(power)) @ vectors.T for power in (0.5, -0.5))
        return Sensitivity(root, inverse, (1 - FLOOR) * tokens / tokens.mean() + FLOOR)

    @staticmethod
    def flat(width: int, tokens: int, read: int | None = None) -> Sensitivity:
        """Every direction counts the same, and every token; of those that nothing reads but the first `read`, little."""
        eye, weights = torch.eye(width, dtype=torch.float64), torch.ones(tokens, dtype=torch.float64)
        if read is not None:
            weights[read:] = 0
            weights = (1 - FLOOR) * weights / weights.mean() + FLOOR
        return Sensitivity(eye, eye, weights)

    def error(self, difference: Tensor) -> float:
        """Σ ω_n ‖L Δy_n‖² of Δy [B, N, D]."""
        squares = (difference @ self.root.to(difference)).square().sum(-1, dtype=torch.float64)
        return float((squares * self.tokens).sum())

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x [B, N, p] as rows [B·N, p], the weight of each row)."""
        return x.flatten(0, -2), self.tokens.to(x).repeat(len(x))


def sensitivities(
    model: nn.Module, family: Family, images: Images, seed: int, likelihood: Likelihood
) -> dict[str, Sensitivity]:
    """Branch module → its sensitivity, from one backward pass over some images; the model is left as it is.

    The gradient of what a branch adds is that of the residual stream after it.
    """
    branches = [branch for found in family.branches(model).values() for branch in found]
    outer: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}

    def keep(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor, name: str) -> Tensor:
        # The parameters ask for no gradient, so the first branch's output starts the graph.
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.retain_grad()
        streams[name] = output
        return output

    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = [
        model.get_submodule(branch.added).register_forward_hook(
            lambda module, inputs, output, name=branch.module: keep(module, inputs, output, name)
        )
        for branch in branches
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for batch, _ in batches(images, BATCH):
                likelihood.score_loss(model(batch), generator).backward()  # type: ignore[no-untyped-call]
                for name, stream in streams.items():
                    assert stream.grad is not None
                    rows = stream.grad.flatten(0, -2)
                    outer[name] = outer.get(name, torch.zeros(())) + (rows.T @ rows).double()
                    squares = stream.grad.square().sum((0, 2), dtype=torch.float64)
                    norms[name] = norms.get(name, torch.zeros(())) + squares
                streams.clear()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    return {name: Sensitivity.of(outer[name], norms[name]) for name in outer}


def flat(model: nn.Module, family: Family, tokens: int) -> Mapping[str, Sensitivity]:
    """Branch module → a sensitivity that prefers nothing, but in the last block the tokens that the head reads."""
    blocks = list(family.branches(model).values())
    return {
        branch.module: Sensitivity.flat(
            int(model.get_submodule(branch.reader).out_features),  # type: ignore[arg-type]
            tokens,
            family.read_tokens(model) if branches is blocks[-1] else None,
        )
        for branches in blocks
        for branch in branches
    }
