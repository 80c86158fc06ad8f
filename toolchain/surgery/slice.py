"""The physical interpreter of a plan: removed rows and columns are cut out of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from toolchain.errors import PlanError
from toolchain.families import UnitGroup
from toolchain.model import Made, MaskedModel, SlicedModel
from toolchain.plan import CompressionPlan
from toolchain.surgery.factorised import side
from toolchain.surgery.mask import baked, decisions, kept_positions


@torch.no_grad()
def slice_module(module: nn.Module, plan: CompressionPlan, groups: Sequence[UnitGroup]) -> None:
    """Cuts the sliceable decisions of a plan out of an unmasked module, in place.

    Rows in `rescale_on_slice` are multiplied by √(kept/total) first: the smaller attention computes with scale
    kept^−½ where the dense one used total^−½.
    """
    cuts = decisions(plan, groups, sliceable=True)
    positions = kept_positions(module, cuts)
    for group, keep in cuts:
        factor = math.sqrt(keep.kept / group.total)
        for span in group.rescale_on_slice:
            _, linear = side(module, span.linear, span.axis)
            rows = slice(span.offset, span.offset + group.partitions * span.width)
            linear.weight[rows] *= factor
            if linear.bias is not None:
                linear.bias[rows] *= factor
        owner = module.get_submodule(group.module)
        for name, value in group.attrs.items():
            setattr(owner, name, value(keep.kept))
    for (name, axis), flags in positions.items():
        _, linear = side(module, name, axis)
        index = flags.nonzero().squeeze(1)
        linear.weight = nn.Parameter(linear.weight.index_select(axis, index))
        if axis == 1:
            linear.in_features = len(index)
        else:
            linear.out_features = len(index)
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.index_select(0, index))


class Slice:
    """MaskedModel → SlicedModel. Positions that stock modules cannot lose stay, as zeros."""

    def requires(self, given: MaskedModel) -> None:
        """Raises PlanError if a decision would leave nothing to keep; `Keep` itself rules out the rest."""
        for group, keep in decisions(given.plan, given.groups, sliceable=True):
            if keep.kept < 1:
                raise PlanError(f"{group.module}.{group.unit} keeps nothing")

    def __call__(self, given: MaskedModel) -> Made[SlicedModel, None]:
        """The model with its removed positions gone."""
        module = baked(given.module)
        slice_module(module, given.plan, given.groups)
        form = given.ref, module, given.family, given.groups, given.preprocess, given.provenance
        return Made(SlicedModel(*form, plan=given.plan), None)

    def ensures(self, given: MaskedModel, made: SlicedModel) -> None:
        """Raises PlanError if a module does not have the width that the plan asks for."""
        cuts = decisions(given.plan, given.groups, sliceable=True)
        for (name, axis), flags in kept_positions(given.module, cuts).items():
            linear, wanted = made.module.get_submodule(name), int(flags.sum())
            assert isinstance(linear, nn.Linear)
            if (size := linear.weight.shape[axis]) != wanted:
                raise PlanError(f"{name} has {size} positions on axis {axis}, the plan asks for {wanted}")
