"""A linear probe: what frozen features know of labels, fitted without chance, and put onto the backbone as its classifier."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

PENALTY = 1e-2
"""Times ½‖W‖², of features that were brought to mean 0 and variance 1."""
STEPS = 300


def fitted(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(weight [K, D], bias [K]) of multinomial logistic regression on features [N, D], in float64 by L-BFGS from zero."""
    values = features.double()
    mean, spread = values.mean(0), values.std(0).clamp(min=1e-6)
    known = (values - mean) / spread
    weight = torch.zeros(classes, values.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = functional.cross_entropy(known @ weight.T + bias, labels) + PENALTY / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimiser.step(loss)  # type: ignore[no-untyped-call]
    scaled = weight.detach() / spread
    return scaled.float(), (bias.detach() - scaled @ mean).float()


def with_head(backbone: Path, head: tuple[Tensor, Tensor], path: Path) -> None:
    """Writes a state dict: the backbone's with a classifier `head`."""
    state = load_file(backbone)
    part = path.with_suffix(".part")
    save_file({**state, "head.weight": head[0].contiguous(), "head.bias": head[1]}, part)
    part.rename(path)
