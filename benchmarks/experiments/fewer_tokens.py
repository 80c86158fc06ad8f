"""What fewer tokens are worth: from some block on mixtures take the place of patches, and `joint` has the rest of the budget.

Widths are chosen by the damages of the dense model and the costs of the one with fewer tokens. Readers behind a mixture are re-fitted
towards the same mixtures of what the dense model computes.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from kinds.compression import Clock
from torch import Tensor, nn

from experiments.freer_attention import FINE
from experiments.mixtures import Mean, Mixture, Soft, area, matching, mixed
from experiments.starts import REFERENCES, Start, parser, record, start
from toolchain.compress.allocation import allocate
from toolchain.compress.branches import first_residual
from toolchain.compress.choices import Budget, Costs, Key, Site, key_of
from toolchain.compress.closed_form import SHARES, teacher_for
from toolchain.compress.damage import measure
from toolchain.compress.reductions import REDUCTIONS, sites_in
from toolchain.compress.ridge import folds_of
from toolchain.compress.sensitivity import Sensitivity, Teacher
from toolchain.compress.sequential import _head, _narrowed, _refitted
from toolchain.compress.solver import Candidate, interpolate, solve_uniform
from toolchain.cost import trace
from toolchain.data import Images
from toolchain.likelihood import divergence_by_image, outputs_of
from toolchain.recipe import BudgetSection
from toolchain.surgery.scales import fold_scales, restore_scales

KIND, BETA, JUDGED = "fewer-tokens", 0.5, 1000
"""The name of its records, the β of every pass, and the validation images by which a re-fit of the classifier is taken or not."""
Mixtures = Mapping[int, Mixture]
SCHEDULES: Mapping[str, Mapping[str, Mixtures]] = {
    "fm17_s3": {
        "mean 3×3 @3": {3: Mean(1, area((4, 4), (3, 3), 1))},
        "soft 3×3 @3": {3: Soft(1, area((4, 4), (3, 3), 1))},
        "matching 12 @3": {3: matching(16, 12, 1)},
        "matching 12 @2, 8 @4": {2: matching(16, 12, 1), 4: matching(12, 8, 1)},
    },
    "fm50_s0": {
        "mean 4×4 @3": {3: Mean(1, area((7, 7), (4, 4), 1))},
        "soft 4×4 @3": {3: Soft(1, area((7, 7), (4, 4), 1))},
        "matching 25 @3": {3: matching(49, 25, 1)},
        "matching 25 @2, 13 @4": {2: matching(49, 25, 1), 4: matching(25, 13, 1)},
    },
}
"""Model → schedule → number of a block, from 0, → what its input becomes."""
BUDGETS: tuple[Mapping[str, float], ...] = ({"params": 0.5}, {"macs": 0.35})


@torch.no_grad()
def reduce_mixed(
    teacher: Teacher,
    module: nn.Module,
    sites: Sequence[Site],
    widths: Mapping[Key, int],
    images: Images,
    mixtures: Mixtures,
) -> Any:
    """`reduce_sequentially` with mixtures between blocks of `module` alone; the classifier's re-fit, not yet applied."""
    dense, blocks = teacher.module, teacher.family.blocks(teacher.module)
    theirs = first_residual(dense, blocks[0].path, images)
    ours, paths = list(theirs), list[Tensor | None]([None] * len(theirs))
    typical: Tensor | None = None
    dampings: dict[str, float] = {}
    folds = torch.split(folds_of(images), [len(our) for our in ours])
    fold_scales(module, teacher.family.branches(dense))
    reduced = False
    for index, block in enumerate(blocks):
        if (mixture := mixtures.get(index)) is not None:
            steps = [mixture.matrix(our) for our in ours]
            ours = [step @ our for step, our in zip(steps, ours, strict=True)]
            paths = [step if path is None else step @ path for step, path in zip(steps, paths, strict=True)]
            typical = mixture.typical if typical is None else mixture.typical @ typical
        for branch in block.branches:
            reader, care = None, _of_mixtures(teacher.cares[branch.module], typical)
            for site in sites_in(branch, sites):
                reduction, width = REDUCTIONS[key_of(site)[1]](module, branch, site, ours, care), widths[key_of(site)]
                reduction.apply(width, refit=True)
                reader, reduced = _narrowed(reader, reduction.reader()), True
            full = [branch.gives(dense, their) for their in theirs]
            if reader is None and (reduced or typical is not None):
                last = module.get_submodule(branch.reader)
                reader = (branch.reader, torch.arange(last.in_features)) if isinstance(last, nn.Linear) else None
            if reader is not None:
                wanted, shown = (
                    [_through(path, y) for path, y in zip(paths, each, strict=True)] for each in (full, theirs)
                )
                pairs = zip(wanted, shown, ours, strict=True)
                towards = (branch.asked(y, their, our, BETA) for y, their, our in pairs)
                added, dampings[reader[0]] = _refitted(module, branch, reader, towards, ours, folds, care)
            else:
                added = (branch.gives(module, our) for our in list(ours))
            for batch, (y, own) in enumerate(zip(full, added, strict=True)):
                theirs[batch] = branch.after(theirs[batch], branch.adds(dense, y))
                ours[batch] = branch.after(ours[batch], branch.adds(module, own))
    return _head(teacher, module, theirs, ours, folds, dampings)


def _through(path: Tensor | None, y: Tensor) -> Tensor:
    return y if path is None else path @ y


def _of_mixtures(care: Sensitivity, typical: Tensor | None) -> Sensitivity:
    """What the output cares about, token by token of what the mixtures so far leave."""
    if typical is None:
        return care
    share = typical.double() / typical.double().sum(0)
    tokens = share @ care.tokens
    return replace(care, tokens=tokens / tokens.mean())


def outcome(
    begun: Start, teacher: Teacher, mixtures: Mixtures, request: Mapping[str, float], measured: Sequence[Candidate]
) -> dict[str, Any]:
    """What is left of the model within a budget, with mixtures or without any."""
    problem, source = begun.job.problem, begun.job.source
    dense, module = problem.dense, copy.deepcopy(problem.dense.module)
    names = [block.path for block in dense.family.blocks(module)]
    costs = problem.costs
    if mixtures:
        shape = trace(mixed(copy.deepcopy(module), names, mixtures), dense.family, dense.preprocess.input_size)
        costs = Costs(shape, problem.costs.groups)
    most = {name: float(int(share * getattr(problem.shape, name))) for name, share in request.items()}
    within = replace(problem, costs=costs, request=BudgetSection(**request), budget=Budget(most))
    within = replace(within, uniform=solve_uniform(within.choices, costs, within.budget))
    chosen = allocate(within, interpolate(measured, within.sites, within.choices, SHARES[0]))
    widths, validation = chosen.widths.kept, source.split("validation").spread(JUDGED)
    head = reduce_mixed(teacher, module, problem.sites_of(widths), widths, source.split("calibration"), mixtures)
    mixed(module, names, mixtures)
    reference = outputs_of(dense.module, validation)

    def apart(made: nn.Module) -> float:
        return float(divergence_by_image(teacher.likelihood, outputs_of(made, validation), reference).mean())

    refitted = copy.deepcopy(module)
    if head is not None:
        head.put_into(refitted)
    taken = min((module, refitted), key=apart)
    restore_scales(taken, dense.module, dense.family.branches(dense.module))
    left = costs.shape(chosen.widths)
    return {
        "params": left.params,
        "macs": left.macs,
        "widths": [[*key, kept] for key, kept in widths.items()],
        "judged": begun.judge(taken),
    }


def main(arguments: Sequence[str]) -> int:
    """0 after the record was written."""
    options = parser(__doc__)
    asked = options.parse_args(arguments)
    if asked.model not in REFERENCES:
        options.error("the backbone has no schedules here: name a reference")
    if asked.budgets:
        options.error("budgets are those of BUDGETS, of parameters and of MACs")
    clock, begun = Clock(), start(asked.model, asked.work, asked.images)
    problem, source = begun.job.problem, begun.job.source
    teacher = teacher_for(problem, source)
    held_out = source.split("validation").spread(int(FINE.images))
    measured = measure(teacher, problem.sites, problem.choices, FINE, source.split("calibration"), held_out)
    clock.lap("damage")
    outcomes = []
    for request in BUDGETS:
        for name, mixtures in {"all": {}, **SCHEDULES[asked.model]}.items():
            found = outcome(begun, teacher, mixtures, request, measured)
            assert math.isfinite(found["judged"]["validation"]["kl"])
            outcomes.append({"budget": dict(request), "tokens": name, **found})
            print({key: value for key, value in outcomes[-1].items() if key != "widths"}, flush=True)
    clock.lap("models")
    shape = problem.shape
    result = {
        "dense": {"params": shape.params, "macs": shape.macs},
        "judged": begun.judge(problem.dense.module),
        "outcomes": outcomes,
    }
    record(KIND, begun, {"beta": BETA, "head_by": JUDGED, **asdict(FINE)}, result, clock.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
