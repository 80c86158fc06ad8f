"""What each width costs: measured on the otherwise dense model, from a cached prefix.

For each block and unit a ladder of widths is tried; the damage of a candidate is the KL divergence of the stitched
model's output from the dense one's, on held-out images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.compress.allocate import Choices
from toolchain.compress.branches import REDUCTIONS, advance, first_residual
from toolchain.compress.solver import Candidate, ladder
from toolchain.families import Branch, Family


def kl_divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean over images of KL(softmax(reference) ‖ softmax(logits)), both [B, K]."""
    ours, theirs = (functional.log_softmax(x.double(), dim=1) for x in (logits, reference))
    return float(functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


@torch.no_grad()
def measure(
    dense: nn.Module,
    family: Family,
    choices: Choices,
    shares: Sequence[float],
    calibration: Dataset[tuple[Tensor, int]],
    held_out: Dataset[tuple[Tensor, int]],
    progress: Callable[[float, str], None] | None = None,
) -> list[Candidate]:
    """The damage of every candidate of every unit.

    Args:
        dense: the model; left as it is.
        family: its declaration.
        choices: the units that may shrink, and their multiples.
        shares: the widths to try, as shares of a unit.
        calibration: images that statistics are taken from.
        held_out: images that damage is measured on.
        progress: receives (share done, text).
    """
    work = copy.deepcopy(dense)
    blocks = family.branches(dense)
    flat = [(block, branch) for block, branches in blocks.items() for branch in branches]
    groups = {group.module: group for group in choices.groups}
    fit, probe = (first_residual(dense, flat[0][0], images) for images in (calibration, held_out))
    reference = finish(dense, family, probe, [branch for _, branch in flat])
    found: list[Candidate] = []
    for index, (block, branch) in enumerate(flat):
        rest = [later for _, later in flat[index + 1 :]]
        if (group := groups.get(branch.module)) is not None:
            rows = family.read_tokens(dense) if block == flat[-1][0] else None
            reduction = REDUCTIONS[group.unit](work, branch, group, fit, rows)
            for kept in ladder(group, choices, shares):
                damage = 0.0
                if kept < group.total:
                    reduction.apply(kept)
                    after = [advance(work, branch, x) for x in probe]
                    damage = max(0.0, kl_divergence(finish(dense, family, after, rest), reference))
                found.append(Candidate((group.module, group.unit), kept, damage))
            work.get_submodule(branch.module).load_state_dict(dense.get_submodule(branch.module).state_dict())
        for batches in (fit, probe):
            batches[:] = [advance(dense, branch, x) for x in batches]
        if progress is not None:
            progress((index + 1) / len(flat), f"damage of {branch.module}")
    return found


def finish(model: nn.Module, family: Family, batches: Sequence[Tensor], branches: Sequence[Branch]) -> Tensor:
    """Logits [B, K] of all batches, from the residual stream before the first of the remaining branches."""
    logits = []
    for batch in batches:
        x = batch
        for branch in branches:
            x = advance(model, branch, x)
        logits.append(family.head(model, x))
    return torch.cat(logits)
