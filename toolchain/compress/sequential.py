"""The closed-form pass: block by block, on what the compressed prefix really feeds them.

Each branch is reduced, then its last linear is re-fitted towards what the dense model computes. What is kept in memory is
the residual stream between two blocks, dense and compressed, and small second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.compress.branches import REDUCTIONS, advance, captured, first_residual, run_branch
from toolchain.compress.moments import Moments
from toolchain.compress.obs import anchored_refit
from toolchain.families import Branch, Family, UnitGroup


@torch.no_grad()
def reduce_sequentially(
    dense: nn.Module,
    module: nn.Module,
    family: Family,
    groups: Sequence[UnitGroup],
    widths: Mapping[tuple[str, str], int],
    images: Dataset[tuple[Tensor, int]],
    *,
    beta: float,
    refit: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> dict[tuple[str, str], tuple[int, ...]]:
    """(module, unit) → kept positions per partition, after reducing `module` in place.

    Args:
        dense: the teacher; left as it is.
        module: a copy of it, or of a form of it with the same residual stream.
        family: declares blocks and branches.
        groups: the units of the model.
        widths: (module, unit) → positions to keep per partition; a unit that is absent is left alone.
        images: calibration images; labels are not read.
        beta: share of the error that earlier blocks left in the residual stream which a branch is asked to correct.
        refit: whether the last linear of a branch is re-fitted after the reduction.
        progress: receives (share done, text).
    """
    blocks = family.branches(dense)
    ours = first_residual(dense, next(iter(blocks)), images)
    theirs = list(ours)
    wanted = {group.module: group for group in groups if (group.module, group.unit) in widths}
    kept: dict[tuple[str, str], tuple[int, ...]] = {}
    for index, (name, branches) in enumerate(blocks.items()):
        rows = family.read_tokens(dense) if index == len(blocks) - 1 else None
        for branch in branches:
            group = wanted.get(branch.module)
            if group is not None:
                key = (group.module, group.unit)
                reduction = REDUCTIONS[group.unit](module, branch, group, ours, rows)
                columns = reduction.apply(widths[key])
                kept[key] = reduction.indices(widths[key])
                if refit:
                    _refit(dense, module, branch, reduction.reader, columns, theirs, ours, rows, beta)
            for batch in range(len(ours)):
                theirs[batch], ours[batch] = advance(dense, branch, theirs[batch]), advance(module, branch, ours[batch])
        if progress is not None:
            progress((index + 1) / len(blocks), name)
    return kept


def _refit(
    dense: nn.Module,
    module: nn.Module,
    branch: Branch,
    reader: str,
    columns: Tensor,
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    rows: slice | None,
    beta: float,
) -> None:
    """Moves the kept columns of a branch's last linear towards y_dense + β(r_dense − r_compressed)."""
    linear, gamma = module.get_submodule(reader), getattr(module.get_submodule(branch.scale), "gamma", None)
    assert isinstance(linear, nn.Linear)
    moments = Moments()
    with captured(module, {reader: "in"}) as seen:
        for their, our in zip(theirs, ours, strict=True):
            owed = beta * (their - our)
            if gamma is not None:  # the branch is scaled before it is added
                owed = torch.where(gamma.abs() > 1e-8, owed / gamma, torch.zeros_like(owed))
            error = run_branch(dense, branch, their) + owed - run_branch(module, branch, our)
            h = seen[reader][..., columns]
            if rows is not None:
                h, error = h[:, rows], error[:, rows]
            moments.add(h.flatten(0, -2), error.flatten(0, -2))
    bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
    fitted, shift = anchored_refit(
        linear.weight[:, columns], bias, moments.covariance, moments.mean, moments.cross, moments.other_mean
    )
    linear.weight[:, columns] = fitted.to(linear.weight)
    if linear.bias is not None:
        linear.bias.copy_(shift)
