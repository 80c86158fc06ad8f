"""Statistics of what enters a linear, over calibration images, without keeping the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.data import batches

BATCH = 64


@dataclass(frozen=True)
class InputMoments:
    """Mean and variance of each input of a linear, over all images and tokens; float64 [in]."""

    mean: Tensor
    variance: Tensor


@contextmanager
def _watch(module: nn.Module, linears: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, inputs: see(name, inputs[0])

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_moments(
    module: nn.Module, linears: Sequence[str], images: Dataset[tuple[Tensor, int]]
) -> dict[str, InputMoments]:
    """Linear → moments of its input, in one pass over `images`; module in eval mode, no gradients."""
    totals: dict[str, tuple[int, Tensor, Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        flat = x.flatten(0, -2).double()  # [tokens, in]
        count, total, square = totals.get(
            name, (0, torch.zeros(flat.shape[1]).double(), torch.zeros(flat.shape[1]).double())
        )
        totals[name] = (count + len(flat), total + flat.sum(0), square + flat.square().sum(0))

    with torch.no_grad(), _watch(module, linears, see):
        for batch, _ in batches(images, BATCH):
            module(batch)
    moments = {}
    for name, (count, total, square) in totals.items():
        mean = total / count
        moments[name] = InputMoments(mean, (square / count - mean.square()).clamp_min(0))
    return moments


def input_taylor(
    module: nn.Module, linears: Sequence[str], images: Dataset[tuple[Tensor, int]]
) -> Mapping[str, Tensor]:
    """Linear → first-order importance of each input, |Σ x·∂L/∂x| per image summed over images; float64 [in].

    L is the cross-entropy with the label, or with the model's own prediction where there is no label (−1).
    Source: Molchanov et al. 2019, "Importance estimation for neural network pruning", arXiv 1906.10771.
    """
    seen: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x.requires_grad_().retain_grad()
        seen[name] = x

    with torch.enable_grad(), _watch(module, linears, see):
        for batch, labels in batches(images, BATCH):
            logits = module(batch)
            target = torch.where(labels < 0, logits.argmax(1), labels)
            gradients = torch.autograd.grad(
                functional.cross_entropy(logits, target, reduction="sum"), list(seen.values())
            )
            for name, gradient in zip(seen, gradients, strict=True):
                score = (seen[name] * gradient).sum(tuple(range(1, gradient.ndim - 1))).abs().sum(0).double().detach()
                totals[name] = totals.get(name, torch.zeros_like(score)) + score
            seen.clear()
    return totals
