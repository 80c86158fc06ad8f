"""The closed-form pass: block by block, on what the compressed prefix really feeds them.

Each branch is reduced, then its last linear is re-fitted towards what the dense model computes. What is kept in memory is
the residual stream between two blocks, dense and compressed, and small second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.compress.allocate import Key
from toolchain.compress.branches import captured, first_residual, fold_scales, input_of, run_branch
from toolchain.compress.moments import Moments
from toolchain.compress.obs import anchored_refit
from toolchain.compress.reductions import REDUCTIONS, sites_in
from toolchain.compress.sensitivity import Sensitivity
from toolchain.compress.solver import Site, key_of
from toolchain.families import Branch, Family
from toolchain.likelihood import Likelihood

HEAD_DAMPING = 0.03  # one row per image is all that the classifier's re-fit has


@dataclass(frozen=True)
class Head:
    """New weights of the classifier: path, weight [K, D], bias [K] or None."""

    name: str
    weight: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def put_into(self, module: nn.Module) -> None:
        """Writes the weights."""
        linear = module.get_submodule(self.name)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(self.weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)


@dataclass(frozen=True)
class Reduced:
    """What a sequential pass decided.

    Attributes:
        kept: key of a site → kept positions per partition.
        head: a re-fit of the classifier to the dense logits, not yet applied; None where there is no one linear.
    """

    kept: dict[Key, tuple[int, ...]]
    head: Head | None


@torch.no_grad()
def reduce_sequentially(
    dense: nn.Module,
    module: nn.Module,
    family: Family,
    sites: Sequence[Site],
    widths: Mapping[Key, int],
    images: Dataset[tuple[Tensor, int]],
    cares: Mapping[str, Sensitivity],
    likelihood: Likelihood,
    *,
    beta: float,
    refit: bool = True,
    sequential: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> Reduced:
    """What was kept, and a re-fit of the classifier to choose or not, after reducing `module` in place.

    Args:
        dense: the teacher; left as it is.
        module: a copy of it, or of a form of it with the same residual stream.
        family: declares blocks and branches.
        sites: what is reduced.
        widths: key of a site → positions to keep per partition, or rank.
        images: calibration images; labels are not read.
        cares: branch module → what the output cares about.
        likelihood: of the outputs.
        beta: share of the error that earlier blocks left in the residual stream which a branch is asked to correct.
        refit: whether what is left takes over: within a reduction, and by a re-fit of each branch's last linear after it.
        sequential: whether a block sees what the reduced blocks before it feed it; if not, what the dense ones do.
        progress: receives (share done, text).
    """
    blocks = family.branches(dense)
    theirs = first_residual(dense, next(iter(blocks)), images)
    ours = list(theirs)
    kept: dict[Key, tuple[int, ...]] = {}
    fold_scales(module, [branch for branches in blocks.values() for branch in branches])
    for index, (name, branches) in enumerate(blocks.items()):
        for branch in branches:
            reader, care = None, cares[branch.module]
            for site in sites_in(branch, sites):
                reduction, width = REDUCTIONS[key_of(site)[1]](module, branch, site, ours, care), widths[key_of(site)]
                reduction.apply(width, refit=refit)
                kept[key_of(site)] = reduction.indices(width)
                reader = reduction.reader() or reader
            wanted = [run_branch(dense, branch, their) for their in theirs]
            if reader is None and kept:  # nothing ends here that was reduced, but it can mend what came before
                last = module.get_submodule(branch.reader)
                reader = (branch.reader, torch.arange(last.in_features)) if isinstance(last, nn.Linear) else None
            if reader is not None and refit:
                added = _refitted(module, branch, reader, wanted, theirs, ours, care, beta)
            else:
                added = (run_branch(module, branch, our) for our in list(ours))
            for batch, (y, own) in enumerate(zip(wanted, added, strict=True)):
                theirs[batch] = theirs[batch] + y
                ours[batch] = ours[batch] + own if sequential else theirs[batch]
        if progress is not None:
            progress((index + 1) / len(blocks), name)
    return Reduced(kept, _head(dense, module, family, theirs, ours, likelihood) if refit else None)


def _head(
    dense: nn.Module,
    module: nn.Module,
    family: Family,
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    likelihood: Likelihood,
) -> Head | None:
    """The last linear that takes up what is left of the error in the outputs, as far as their reader notices it."""
    name = family.classifier(dense)
    if name is None:
        return None
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    moments = Moments(centred=linear.bias is not None)
    with captured(module, {name: "in"}) as seen:
        for their, our in zip(theirs, ours, strict=True):
            error = family.head(dense, their) - family.head(module, our)
            moments.add(seen[name], likelihood.noticed(error))
    bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
    fitted = anchored_refit(
        linear.weight, bias, moments.covariance, moments.mean, moments.cross, moments.other_mean, HEAD_DAMPING
    )
    new_bias = None if linear.bias is None else fitted[1].to(linear.weight)
    return Head(name, fitted[0].to(linear.weight), new_bias)


def _refitted(
    module: nn.Module,
    branch: Branch,
    reader: tuple[str, Tensor],
    wanted: Sequence[Tensor],
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    care: Sensitivity,
    beta: float,
) -> Iterator[Tensor]:
    """What a branch adds, batch by batch, after a re-fit of the kept columns of its last linear.

    They move towards y_dense + β(r_dense − r_compressed). What enters them is kept meanwhile: it is computed once.
    """
    name, columns = reader
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    moments = Moments(centred=linear.bias is not None)
    entering = [input_of(module, branch, name, our)[..., columns] for our in ours]
    weight = linear.weight[:, columns]
    for x, y, their, our in zip(entering, wanted, theirs, ours, strict=True):
        error = y + beta * (their - our) - functional.linear(x, weight, linear.bias)
        rows, weights = care.rows(x)
        moments.add(rows, error.flatten(0, -2), weights)
    bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
    fitted, shift = anchored_refit(weight, bias, moments.covariance, moments.mean, moments.cross, moments.other_mean)
    linear.weight[:, columns] = fitted.to(linear.weight)
    if linear.bias is not None:
        linear.bias.copy_(shift)
    return (functional.linear(x, linear.weight[:, columns], linear.bias) for x in entering)
