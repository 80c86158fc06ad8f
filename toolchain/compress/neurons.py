"""Importance of feed-forward neurons; a new criterion is one function and one line in `CRITERIA`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.compress.calibrate import input_moments, input_taylor
from toolchain.families import UnitGroup
from toolchain.surgery.factorised import side


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: the model, its neuron groups, calibration images, a seed."""

    module: nn.Module
    groups: Sequence[UnitGroup]
    images: Dataset[tuple[Tensor, int]]
    seed: int


Scores = dict[tuple[str, str], Tensor]


def _rows(module: nn.Module, group: UnitGroup) -> Tensor:
    """Squared norm of the weights that produce each neuron, [total]."""
    total = torch.zeros(group.total, dtype=torch.float64)
    for span in group.spans:
        if span.axis == 0:
            weight = side(module, span.linear, 0)[1].weight.detach().double()
            total += weight[span.offset : span.offset + span.width].square().sum(1)
    return total


def _columns(module: nn.Module, group: UnitGroup) -> tuple[str, Tensor]:
    """(plain linear that reads the neurons, squared norm of the column that reads each, [total])."""
    span = next(span for span in group.spans if span.axis == 1)
    name, linear = side(module, span.linear, 1)
    return name, linear.weight.detach().double()[:, span.offset : span.offset + span.width].square().sum(0)


def magnitude(given: Evidence) -> Scores:
    """‖w_in‖·‖w_out‖ of each neuron [total]: no data."""
    return {(g.module, g.unit): (_rows(given.module, g) * _columns(given.module, g)[1]).sqrt() for g in given.groups}


def variance(given: Evidence) -> Scores:
    """Var(h_j)·‖W2_:j‖² [total], h what the reader W2 [D, total] reads: the output energy that is lost when a neuron is replaced by its mean."""
    readers = {(g.module, g.unit): _columns(given.module, g) for g in given.groups}
    moments = input_moments(given.module, [name for name, _ in readers.values()], given.images)
    return {key: moments[name].variance * energy for key, (name, energy) in readers.items()}


def taylor(given: Evidence) -> Scores:
    """|Σ h_j·∂L/∂h_j| [total]: the first-order change of the loss when a neuron is removed; Molchanov 2019, arXiv 1906.10771."""
    readers = {(g.module, g.unit): _columns(given.module, g)[0] for g in given.groups}
    found = input_taylor(given.module, list(readers.values()), given.images)
    return {key: found[name] for key, name in readers.items()}


def random(given: Evidence) -> Scores:
    """Seeded noise in [0, 1), [total]: the baseline that every criterion must beat."""
    generator = torch.Generator().manual_seed(given.seed)
    return {(g.module, g.unit): torch.rand(g.total, generator=generator).double() for g in given.groups}


CRITERIA: Mapping[str, Callable[[Evidence], Scores]] = {
    "magnitude": magnitude,
    "variance": variance,
    "taylor": taylor,
    "random": random,
}
