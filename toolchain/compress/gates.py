"""VTP's learned gates (Zhu, Tang, Han 2021, "Vision Transformer Pruning", arXiv 2104.08500).

A gate multiplies one input of a linear. It is written as a parametrization of the linear that reads the gated
positions, W·diag(a), which is the same function as gating the activations, trains with the weights, and folds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from toolchain.compress.criteria import Criterion, Evidence, Scores
from toolchain.compress.needs import Needs
from toolchain.families import UnitGroup
from toolchain.surgery.factorised import side
from toolchain.training.checkpoint import Done
from toolchain.training.loop import FitConfig, ParamGroup, default_param_groups, fit


class Gate(nn.Module):
    """Multiplies some columns of a weight [out, in], from `offset` on, by a shared vector a [total], which starts at 1."""

    def __init__(self, values: nn.Parameter, offset: int) -> None:
        super().__init__()
        self.values, self.offset = values, offset

    def forward(self, weight: Tensor) -> Tensor:
        """W·diag(1, a, 1), [out, in]."""
        behind = weight.shape[1] - self.offset - len(self.values)
        return weight * functional.pad(self.values, (self.offset, behind), value=1.0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself: at a = 1 nothing changes."""
        return weight


def add_gates(module: nn.Module, groups: Sequence[UnitGroup]) -> dict[tuple[str, str], nn.Parameter]:
    """(module, unit) → its gate [total]; registered in place on every linear that reads the unit."""
    gates: dict[tuple[str, str], nn.Parameter] = {}
    for group in groups:
        readers = [(side(module, span.linear, 1)[1], span.offset) for span in group.spans if span.axis == 1]
        gate = gates[group.module, group.unit] = nn.Parameter(torch.ones(group.total).to(readers[0][0].weight))
        for reader, offset in readers:
            parametrize.register_parametrization(reader, "weight", Gate(gate, offset))
    return gates


def learn_gates(known: Evidence) -> tuple[Scores, Done]:
    """(|a| of every unit, what training did), after training gates and weights together on CE + λ·Σ|a|.

    The gates stay registered; `toolchain.surgery.mask.baked` folds them. L1 on a gate alone can be undone by rescaling
    the weight that it multiplies, so weight decay stays on the weights and is kept off the gates.
    """
    lessons, config = known.lessons, known.section.vtp
    assert lessons is not None
    gates = add_gates(known.module, known.groups)
    own = {id(gate) for gate in gates.values()}

    def loss(model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
        penalty = torch.stack([gate.abs().sum() for gate in gates.values()]).sum()
        return lessons.likelihood.supervised(model(batch), labels) + config.l1 * penalty

    def param_groups(model: nn.Module, fit_config: FitConfig) -> list[ParamGroup]:
        weights = [
            {**group, "params": [p for p in group["params"] if id(p) not in own]}
            for group in default_param_groups(model, fit_config)
        ]
        return [*weights, {"params": list(gates.values()), "lr": config.gate_lr, "weight_decay": 0.0}]

    result = fit(
        known.module,
        lessons.images,
        config=FitConfig(
            config.epochs,
            config.lr,
            config.batch_size,
            shift_px=lessons.shift_px,
            flip=lessons.flip,
            seed=known.section.seed,
        ),
        loss=loss,
        param_groups=param_groups,
        checkpoint=lessons.checkpoint,
        key=lessons.key,
        on_step=lambda step: step.tell(lessons.progress),
    )
    return {name: gate.detach().abs().double() for name, gate in gates.items()}, result


VTP = Criterion(
    "vtp",
    lambda known: learn_gates(known)[0],
    Needs(training=True),
    least_kept=lambda section: 1 - section.vtp.max_prune_ratio,
    every_unit=True,
)
"""Used alone it gates every kind of dimension, as published; if attention shrinks by another method, only hidden neurons."""
