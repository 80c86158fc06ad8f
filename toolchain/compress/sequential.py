"""The closed-form pass: reduces block by block, on the activations of the already compressed prefix.

Each branch is reduced, then its last linear is re-fitted towards what the dense model computes. What is kept in memory is
the residual stream between two blocks, dense and compressed, and small second moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.compress.branches import captured, first_residual, input_of
from toolchain.compress.choices import Key, Site, key_of
from toolchain.compress.reductions import REDUCTIONS, sites_in
from toolchain.compress.ridge import Ridge, folds_of
from toolchain.compress.sensitivity import Sensitivity, Teacher
from toolchain.families import Branch
from toolchain.progress import SILENT, Progress
from toolchain.surgery.scales import fold_scales


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
    """The outcome of a sequential pass.

    Attributes:
        kept: key of a site → kept positions per partition.
        head: a re-fit of the classifier to the dense logits, not yet applied; None where there is no one linear.
        dampings: linear that was re-fitted → how far it was held back, as in `Ridge`.
    """

    kept: dict[Key, tuple[int, ...]]
    head: Head | None
    dampings: dict[str, float]


@dataclass(frozen=True)
class Pass:
    """Settings of one pass over the blocks.

    Attributes:
        beta: share of the error that earlier blocks left in the residual stream which a branch is asked to correct.
        refit: whether what is left takes over: within a reduction, and by a re-fit of each branch's last linear after it.
        sequential: whether a block sees what the reduced blocks before it feed it; if not, what the dense ones do.
        dampings: linear → how far its re-fit is held back; that of others is chosen, as in `Ridge`.
    """

    beta: float
    refit: bool = True
    sequential: bool = True
    dampings: Mapping[str, float] = field(default_factory=dict)


@torch.no_grad()
def reduce_sequentially(
    teacher: Teacher,
    module: nn.Module,
    sites: Sequence[Site],
    widths: Mapping[Key, int],
    images: Dataset[tuple[Tensor, int]],
    how: Pass,
    progress: Progress = SILENT,
) -> Reduced:
    """What was kept, and a re-fit of the classifier to choose or not, after reducing `module` in place.

    Args:
        teacher: the dense model.
        module: a copy of it, or of a form of it with the same residual stream.
        sites: what is reduced.
        widths: key of a site → positions to keep per partition, or rank.
        images: calibration images; labels are not read.
        how: the pass.
        progress: told about every block.
    """
    dense, blocks = teacher.module, teacher.family.blocks(teacher.module)
    theirs = first_residual(dense, blocks[0].path, images)
    ours = list(theirs)
    kept: dict[Key, tuple[int, ...]] = {}
    dampings: dict[str, float] = {}
    folds = torch.split(folds_of(images), [len(our) for our in ours])
    fold_scales(module, teacher.family.branches(dense))
    for index, block in enumerate(blocks):
        if block.bridge is not None:
            theirs = [block.bridge(dense, their) for their in theirs]
            ours = [block.bridge(module, our) for our in ours] if how.sequential else list(theirs)
        for branch in block.branches:
            reader, care = None, teacher.cares[branch.module]
            for site in sites_in(branch, sites):
                reduction, width = REDUCTIONS[key_of(site)[1]](module, branch, site, ours, care), widths[key_of(site)]
                reduction.apply(width, refit=how.refit)
                kept[key_of(site)] = reduction.indices(width)
                reader = _narrowed(reader, reduction.reader())
            wanted = [branch.gives(dense, their) for their in theirs]
            if reader is None and kept:  # nothing ends here that was reduced, but it can mend what came before
                last = module.get_submodule(branch.reader)
                reader = (branch.reader, torch.arange(last.in_features)) if isinstance(last, nn.Linear) else None
            if reader is not None and how.refit:
                pairs = zip(wanted, theirs, ours, strict=True)
                towards = (branch.asked(y, their, our, how.beta) for y, their, our in pairs)
                given = how.dampings.get(reader[0])
                added, dampings[reader[0]] = _refitted(module, branch, reader, towards, ours, folds, care, given)
            else:
                added = (branch.gives(module, our) for our in list(ours))
            for batch, (y, own) in enumerate(zip(wanted, added, strict=True)):
                theirs[batch] = branch.after(theirs[batch], branch.adds(dense, y))
                ours[batch] = branch.after(ours[batch], branch.adds(module, own)) if how.sequential else theirs[batch]
        progress.at((index + 1) / len(blocks), f"reducing {block.path}")
    head = _head(teacher, module, theirs, ours, folds, dampings, how.dampings) if how.refit else None
    return Reduced(kept, head, dampings)


def _narrowed(reader: tuple[str, Tensor] | None, latest: tuple[str, Tensor] | None) -> tuple[str, Tensor] | None:
    """The linear that ends a branch and its columns that are left, after one more site of the branch was reduced."""
    if reader is None or latest is None or reader[0] != latest[0]:
        return latest or reader
    return latest[0], latest[1][torch.isin(latest[1], reader[1])]


def _head(
    teacher: Teacher,
    module: nn.Module,
    theirs: Sequence[Tensor],
    ours: Sequence[Tensor],
    folds: Sequence[Tensor],
    dampings: dict[str, float],
    given: Mapping[str, float] | None = None,
) -> Head | None:
    """The last linear that takes up what is left of the error in the outputs, as far as their reader notices it."""
    dense, family = teacher.module, teacher.family
    name = family.classifier(dense)
    if name is None:
        return None
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    ridge = Ridge(centred=linear.bias is not None)
    with captured(module, {name: "in"}) as seen:
        for their, our, fold in zip(theirs, ours, folds, strict=True):
            error = teacher.likelihood.noticed(family.head(dense, their) - family.head(module, our))
            ridge.add(
                seen[name].reshape(len(our), -1, linear.in_features),
                error.reshape(len(our), -1, linear.out_features),
                fold,
            )
    weight, bias, dampings[name] = ridge.fitted(linear.weight, linear.bias, (given or {}).get(name))
    return Head(name, weight.to(linear.weight), None if linear.bias is None else bias.to(linear.weight))


def _refitted(
    module: nn.Module,
    branch: Branch,
    reader: tuple[str, Tensor],
    wanted: Iterable[Tensor],
    ours: Sequence[Tensor],
    folds: Sequence[Tensor],
    care: Sensitivity,
    given: float | None = None,
) -> tuple[Iterator[Tensor], float]:
    """(what a branch gives, batch by batch, after a re-fit of the kept columns of its last linear, its damping).

    They move towards what is wanted of the branch: y_dense + β(r_dense − r_compressed). What enters them is kept
    meanwhile: it is computed once.
    """
    name, columns = reader
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    ridge = Ridge(centred=linear.bias is not None)
    entering = [input_of(module, branch, name, our)[..., columns] for our in ours]
    weight = linear.weight[:, columns]
    for x, y, our, fold in zip(entering, wanted, ours, folds, strict=True):
        error = branch.arranged(module, y) - functional.linear(x, weight, linear.bias)
        weights = care.weights(module, branch, our).to(x).reshape(len(our), -1)
        entered, lacking = (part.reshape(len(our), -1, part.shape[-1]) for part in (x, error))
        ridge.add(entered, lacking, fold, weights)
    fitted, shift, damping = ridge.fitted(weight, linear.bias, given)
    linear.weight[:, columns] = fitted.to(linear.weight)
    if linear.bias is not None:
        linear.bias.copy_(shift)
    if branch.arrange is not None:
        return (branch.gives(module, our) for our in list(ours)), damping
    return (functional.linear(x, linear.weight[:, columns], linear.bias) for x in entering), damping
