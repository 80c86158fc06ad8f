"""The reversible interpreter of a plan: removed positions are held at zero, shapes stay.

A mask is a parametrization of a weight, so that training cannot move a removed position however it updates the
weights. What is masked is exactly what slicing removes: the rows (and bias) that produce a position and the columns
that read it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from toolchain.families import UnitGroup
from toolchain.model import MaskedModel, TimmModel
from toolchain.plan import CompressionPlan, Keep
from toolchain.surgery.check import check_plan
from toolchain.surgery.factorised import replace_module, side


class Mask(nn.Module):
    """Multiplies a tensor by a fixed 0/1 tensor that broadcasts to its shape."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The masked tensor, same shape."""
        return weight * self.mask

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store so that `forward` gives the masked `weight`: the weight itself."""
        return weight


def kept_positions(module: nn.Module, keeps: Sequence[tuple[UnitGroup, Keep]]) -> dict[tuple[str, int], Tensor]:
    """(plain linear, axis) → bool [size of that axis], True where no decision removes the position."""
    kept: dict[tuple[str, int], Tensor] = {}
    for group, keep in keeps:
        for span in group.spans:
            name, linear = side(module, span.linear, span.axis)
            size = linear.out_features if span.axis == 0 else linear.in_features
            flags = kept.setdefault((name, span.axis), torch.ones(size, dtype=torch.bool))
            for partition, indices in enumerate(keep.indices):
                start = span.offset + partition * span.width
                inside = torch.zeros(span.width, dtype=torch.bool)
                inside[list(indices)] = True
                flags[start : start + span.width] &= inside
    return kept


def decisions(
    plan: CompressionPlan, groups: Sequence[UnitGroup], *, sliceable: bool | None = None
) -> list[tuple[UnitGroup, Keep]]:
    """The groups that the plan decides on, with the decision; only (un)sliceable ones if asked."""
    pairs = ((group, plan.keep(group.module, group.unit)) for group in groups)
    return [(g, k) for g, k in pairs if k is not None and (sliceable is None or g.sliceable == sliceable)]


def add_masks(module: nn.Module, plan: CompressionPlan, groups: Sequence[UnitGroup]) -> None:
    """Registers the masks of a plan on a module whose low-rank linears are already factorised, in place."""
    masks: dict[tuple[str, str], Tensor] = {}
    for (name, axis), flags in kept_positions(module, decisions(plan, groups)).items():
        if bool(flags.all()):
            continue
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        values = flags.to(linear.weight)
        weight = (name, "weight")
        masks[weight] = masks.get(weight, torch.ones_like(values[:1])) * (values[:, None] if axis == 0 else values)
        if axis == 0 and linear.bias is not None:
            masks[name, "bias"] = values
    for (name, tensor), mask in masks.items():
        parametrize.register_parametrization(module.get_submodule(name), tensor, Mask(mask))


def baked(module: nn.Module) -> nn.Module:
    """A copy without parametrizations, holding the effective weights.

    Parametrized linears are rebuilt: `remove_parametrizations` would reach the original through the class that it
    shares with its copy.
    """
    plain = copy.deepcopy(module)
    for name, child in list(plain.named_modules()):
        if isinstance(child, nn.Linear) and parametrize.is_parametrized(child):
            linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
            linear.weight = nn.Parameter(child.weight.detach().clone())
            if child.bias is not None:
                linear.bias = nn.Parameter(child.bias.detach().clone())
            replace_module(plain, name, linear)
    return plain


def mask_model(model: TimmModel, module: nn.Module, plan: CompressionPlan) -> MaskedModel:
    """The masked form of `module`, which is the dense model with its low-rank linears already factorised.

    Args:
        model: the dense model that the plan was made for.
        module: its compressed weights; masked in place.
        plan: what to remove.

    Raises:
        PlanError: the plan does not fit the model.
    """
    check_plan(plan, model.module, model.groups)
    add_masks(module, plan, model.groups)
    return MaskedModel(
        model.ref, module.eval(), model.family, model.groups, model.preprocess, model.provenance, plan=plan
    )
