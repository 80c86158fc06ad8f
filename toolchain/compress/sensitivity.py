"""Sensitivity of the model's output to errors of each branch, by direction and by token.

The Fisher information of the model's own predictions, factored as in K-FAC (Martens & Grosse 2015, arXiv 1503.05671):
an error Δy of a branch costs about ½ Σ_n ω_n Δy_nᵀ G Δy_n nats, G = E[g gᵀ], g the gradient of log p(ŷ) with ŷ drawn from
the model itself, by the likelihood of its outputs. No label is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolchain.compress.moments import damped, require_finite
from toolchain.data import Images, batches
from toolchain.errors import DataError
from toolchain.families import Branch, Family
from toolchain.likelihood import NOTHING_VARIES, Likelihood, parts_of
from toolchain.parity import ROUNDING
from toolchain.progress import SILENT, Progress

BATCH = 8  # a backward pass holds what every block computed
DAMPING = 0.05
"""Least curvature of a direction, as a share of the mean: few images do not show every direction that matters."""
FLOOR = 0.1
"""Least weight of a token, as a share of the mean, for the same reason: one row per image is too few."""


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of the outputs to one branch.

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
        values = values.clamp_min(DAMPING / 10)  # rounding in float32 may leave more below zero than damping adds
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
        """Σ ω_n ‖L Δy_n‖² of Δy [B, *, D]."""
        squares = (difference @ self.root.to(difference)).square().sum(-1, dtype=torch.float64)
        return float((squares.flatten(1) * self.tokens).sum())

    def weights(self, model: nn.Module, branch: Branch, x: Tensor) -> Tensor:
        """ω of each row that linears of a branch are given of a stream x [B, *, D]; [G, n]."""
        shape = branch.base(x).shape
        laid_out = self.tokens.reshape(shape[1:-1])[..., None].expand(*shape[:-1], 1)
        return branch.arranged(model, laid_out)[..., 0]


def sensitivities(
    model: nn.Module,
    family: Family,
    images: Images,
    seed: int,
    likelihood: Likelihood,
    progress: Progress = SILENT,
) -> dict[str, Sensitivity]:
    """Branch module → its sensitivity, from one backward pass over some images; the model is left as it is.

    The gradient of what a branch adds is that of the residual stream after it. Where a norm follows, it is that of what
    enters the norm.

    Raises:
        ModelError: the model's outputs are not finite for one of the images.
        DataError: they are the same for all of several images.
    """
    branches = family.branches(model)
    outer: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}

    def keep(output: Tensor, name: str) -> Tensor:
        # The parameters ask for no gradient, so the first branch's output starts the graph.
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.retain_grad()
        streams[name] = output
        return output

    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    handles = [
        model.get_submodule(branch.added).register_forward_hook(
            lambda _module, _inputs, output, name=branch.module: keep(output, name)
        )
        if branch.norm is None
        else model.get_submodule(branch.norm).register_forward_pre_hook(
            lambda _module, inputs, name=branch.module: keep(inputs[0], name)
        )
        for branch in branches
    ]
    generator, shown = torch.Generator().manual_seed(seed), list[Tensor]()
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            parts = batches(images, BATCH)
            for number, (batch, _) in enumerate(parts):
                outputs = model(batch)
                shown.append(parts_of(outputs)[0].detach())
                require_finite(*parts_of(outputs))  # a draw from what is no distribution would fail without saying why
                likelihood.score_loss(outputs, generator).backward()  # type: ignore[no-untyped-call]
                for name, stream in streams.items():
                    assert stream.grad is not None
                    rows = stream.grad.flatten(0, -2)
                    outer[name] = outer.get(name, torch.zeros(())) + (rows.T @ rows).double()
                    squares = stream.grad.square().flatten(1, -2).sum((0, 2), dtype=torch.float64)
                    norms[name] = norms.get(name, torch.zeros(())) + squares
                streams.clear()
                progress.at((number + 1) / len(parts), "what the outputs care about")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    _require_varied(torch.cat(shown))
    return {name: Sensitivity.of(outer[name], norms[name]) for name in outer}


def _require_varied(outputs: Tensor) -> None:
    """Raises DataError if outputs [B, …] are the same for all of several images: every smaller model would then be as good."""
    if len(outputs) > 1 and bool((outputs - outputs[0]).abs().max() <= ROUNDING * outputs.abs().max()):
        raise DataError(NOTHING_VARIES.format(f"outputs are the same for all {len(outputs)} calibration images"))


def flat(model: nn.Module, family: Family, tokens: Mapping[str, int]) -> Mapping[str, Sensitivity]:
    """Branch module → a sensitivity that prefers nothing, but in the last block the tokens that the head reads.

    Args:
        model, family: the model.
        tokens: linear → how many rows it is given of one image.
    """
    blocks, read = family.blocks(model), family.read_tokens(model)
    return {
        branch.module: Sensitivity.flat(
            int(model.get_submodule(branch.reader).out_features),  # type: ignore[arg-type]
            tokens[block.branches[-1].reader],
            read if block is blocks[-1] else None,
        )
        for block in blocks
        for branch in block.branches
    }


@dataclass(frozen=True)
class Teacher:
    """A dense model, its likelihood and its sensitivities, as the closed form uses them.

    Attributes:
        module, family: the model; it is left as it is.
        likelihood: of its outputs, by which others are held against them.
        cares: branch module → what the outputs care about.
    """

    module: nn.Module
    family: Family
    likelihood: Likelihood
    cares: Mapping[str, Sensitivity]
