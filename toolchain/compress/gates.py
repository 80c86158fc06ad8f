"""VTP's learned gates (Zhu, Tang, Han 2021, "Vision Transformer Pruning", arXiv 2104.08500).

A gate multiplies one input of a linear. It is written as a parametrization of the linear that reads the gated
positions, W·diag(a), which is the same function as gating the activations, trains with the weights, and folds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import Dataset

from toolchain.compress.neurons import Scores
from toolchain.families import UnitGroup
from toolchain.likelihood import Likelihood
from toolchain.progress import SILENT, Progress
from toolchain.recipe import VtpSection
from toolchain.surgery.factorised import side
from toolchain.training.loop import FitConfig, FitResult, default_param_groups, fit


class Gate(nn.Module):
    """Multiplies the columns of a weight [out, in] by a shared vector a [in], which starts at 1."""

    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values

    def forward(self, weight: Tensor) -> Tensor:
        """W·diag(a), [out, in]."""
        return weight * self.values

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself: at a = 1 nothing changes."""
        return weight


def add_gates(module: nn.Module, groups: Sequence[UnitGroup]) -> dict[tuple[str, str], nn.Parameter]:
    """(module, unit) → its gate [total]; registered in place on every linear that reads the unit."""
    gates: dict[tuple[str, str], nn.Parameter] = {}
    for group in groups:
        readers = [side(module, span.linear, 1)[1] for span in group.spans if span.axis == 1]
        gate = gates[group.module, group.unit] = nn.Parameter(torch.ones(group.total).to(readers[0].weight))
        for reader in readers:
            parametrize.register_parametrization(reader, "weight", Gate(gate))
    return gates


def learn_gates(
    module: nn.Module,
    groups: Sequence[UnitGroup],
    images: Dataset[tuple[Tensor, int]],
    config: VtpSection,
    likelihood: Likelihood,
    *,
    seed: int,
    augment: dict[str, Any],
    checkpoint: Path | None = None,
    key: str = "",
    progress: Progress = SILENT,
) -> tuple[Scores, FitResult]:
    """(|a| of every unit, what training did), after training gates and weights together on CE + λ·Σ|a|.

    The gates stay registered; `toolchain.surgery.mask.baked` folds them. L1 on a gate alone can be undone by rescaling
    the weight that it multiplies, so weight decay stays on the weights and is kept off the gates.

    Args:
        module: the model; it gets the gates, and is trained in place.
        groups: the units to gate, all with one partition.
        images: labelled training images.
        config: [compress.vtp].
        likelihood: of the outputs, which says what CE is.
        seed: of order and augmentation.
        augment: augmentation fields of `FitConfig`.
        checkpoint: resumed from and written to.
        key: digest of what else the outcome depends on.
        progress: told after every step.
    """
    gates = add_gates(module, groups)
    own = {id(gate) for gate in gates.values()}

    def loss(model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
        penalty = torch.stack([gate.abs().sum() for gate in gates.values()]).sum()
        return likelihood.supervised(model(batch), labels) + config.l1 * penalty

    def param_groups(model: nn.Module, fit_config: FitConfig) -> list[dict[str, Any]]:
        weights = [
            {**group, "params": [p for p in group["params"] if id(p) not in own]}
            for group in default_param_groups(model, fit_config)
        ]
        return [*weights, {"params": list(gates.values()), "lr": config.gate_lr, "weight_decay": 0.0}]

    fit_config = FitConfig(config.epochs, config.lr, config.batch_size, seed=seed, **augment)
    result = fit(
        module,
        images,
        config=fit_config,
        loss=loss,
        param_groups=param_groups,
        checkpoint=checkpoint,
        key=key,
        on_step=lambda step: step.tell(progress),
    )
    return {name: gate.detach().abs().double() for name, gate in gates.items()}, result
