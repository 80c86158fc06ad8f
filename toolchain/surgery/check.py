"""Checks a plan against its model before any weight is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from toolchain.errors import PlanError
from toolchain.families import UnitGroup
from toolchain.plan import CompressionPlan


def check_plan(plan: CompressionPlan, module: nn.Module, groups: Sequence[UnitGroup]) -> None:
    """Raises PlanError if a decision does not fit the dense model: a wrong name, total, partition count or shape."""
    units = {(group.module, group.unit): group for group in groups}
    for keep in plan.keeps:
        where = f"{keep.module}.{keep.unit}"
        group = units.get((keep.module, keep.unit))
        if group is None:
            near = sorted({unit for name, unit in units if name == keep.module})
            hint = f"units of {keep.module}: {', '.join(near)}" if near else f"the model has no module {keep.module!r}"
            raise PlanError(f"{where} is not a unit of {plan.model.name}; {hint}. Was the plan made for another model?")
        if keep.total != group.total or len(keep.indices) != group.partitions:
            raise PlanError(
                f"{where}: the plan has {len(keep.indices)} partitions of {keep.total}, the model {group.partitions} "
                f"of {group.total}. Was the plan made for another model?"
            )
        if group.equal_per_partition and len({len(part) for part in keep.indices}) > 1:
            raise PlanError(f"{where}: every partition must keep the same number, got {[len(p) for p in keep.indices]}")
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for low in plan.low_ranks:
        linear = linears.get(low.module)
        if linear is None:
            raise PlanError(f"{low.module} is not a linear of {plan.model.name}. Was the plan made for another model?")
        if tuple(linear.weight.shape) != low.shape:
            raise PlanError(f"{low.module} has shape {tuple(linear.weight.shape)}, the plan says {low.shape}")
