"""What a narrower residual stream is worth: `joint` with it and without it, at equal parameters.

The stream is narrowed first and `joint` has the rest of the budget: its widths by the damages of the dense model and the costs of the
narrower one, its sequential pass against the dense model, each branch asked for what lies within the stream.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from kinds.compression import Clock
from records import Results
from torch import nn

from experiments.freer_attention import FINE
from experiments.starts import NAME, REFERENCES, RESULTS, Start, parser, record, start, within
from experiments.streams import NarrowFamily, Stream, narrow, narrowed, read, write_within
from toolchain.compress.allocation import Allocation, allocate
from toolchain.compress.choices import Budget, Costs
from toolchain.compress.closed_form import SHARES, reduce_closed_form, teacher_for
from toolchain.compress.damage import Effort, measure
from toolchain.compress.problem import Problem
from toolchain.compress.sensitivity import Teacher
from toolchain.compress.solver import Candidate, interpolate, solve_uniform
from toolchain.cost import trace
from toolchain.recipe import BudgetSection

KIND, IMAGES = "narrower-stream", 256
"""The name of its records, and images that the stream is chosen by."""
COARSE = Effort(SHARES[0], 3, 64)
"""How damage is looked at where time is short."""
ALIKE = 1e-3
"""How far the outputs of the model that writes within a stream and of the narrower model may be apart."""


@dataclass(frozen=True)
class Narrower:
    """A problem whose stream is narrower, and its dense form that writes within it."""

    problem: Problem
    module: nn.Module

    @staticmethod
    def of(problem: Problem, stream: Stream) -> Narrower:
        """Nothing of the blocks is smaller yet."""
        dense, module = problem.dense, copy.deepcopy(problem.dense.module)
        write_within(module, stream)
        shape = trace(narrowed(module, stream), dense.family, dense.preprocess.input_size)
        return Narrower(replace(problem, costs=Costs(shape, problem.costs.groups)), module)

    def within(self, params: float, dense_params: int) -> Problem:
        """The problem within a share of the parameters that the dense model has."""
        problem, budget = self.problem, Budget({"params": float(int(params * dense_params))})
        uniform = solve_uniform(problem.choices, problem.costs, budget)
        return replace(problem, request=BudgetSection(params=params), budget=budget, uniform=uniform)


def allocated(problem: Problem, measured: Sequence[Candidate]) -> Allocation:
    """The knapsack's widths."""
    return allocate(problem, interpolate(measured, problem.sites, problem.choices, SHARES[0]))


def outcome(
    begun: Start, teacher: Teacher, stream: Stream | None, params: float, measured: Sequence[Candidate]
) -> dict[str, Any]:
    """What is left of the model within a budget, with a stream or as wide as it was."""
    dense = begun.job.problem
    if stream is None:
        problem, module = within(dense, params), copy.deepcopy(dense.dense.module)
    else:
        narrower = Narrower.of(dense, stream)
        problem, module = narrower.within(params, dense.shape.params), narrower.module
        teacher = replace(teacher, family=NarrowFamily(dense.dense.module, stream))
    chosen = allocated(problem, measured)
    _, facts = reduce_closed_form(problem, teacher, module, chosen.widths.kept, begun.job.source)
    return {
        "params": chosen.predicted.params,
        "predicted": sum(chosen.damage.values()),
        "beta": facts.beta,
        "widths": [[*key, kept] for key, kept in chosen.widths.kept.items()],
        "judged": begun.judge(module if stream is None else shipped(begun, module, stream)),
    }


@torch.no_grad()
def shipped(begun: Start, module: nn.Module, stream: Stream) -> nn.Module:
    """The narrower model, after its outputs were held against those of the one that writes within the stream."""
    made = narrowed(module, stream)
    images = torch.stack([begun.job.source.split("validation")[at][0] for at in range(8)])
    apart = float((made(images) - module(images)).abs().max())
    assert apart < ALIKE, f"the narrower model is another function: its outputs differ by {apart:.1e}"
    return made


def described(stream: Stream | None, kind: str, params: float, found: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the record."""
    return {"width": None if stream is None else stream.width, "basis": kind, "budget": params, **found}


def others(begun: Start, definition: dict[str, Any]) -> list[dict[str, Any]]:
    """What the record that is there has of other budgets, if nothing else differs; the definition then names these too."""
    old = Results(RESULTS).read(NAME, f"{KIND}.{begun.name}")
    if old is None or any(old.definition.get(name) != definition[name] for name in definition if name != "budgets"):
        return []
    if old.definition["calibration_images"] != len(begun.job.source.split("calibration")):
        return []
    kept = [row for row in old.result["outcomes"] if row["budget"] not in definition["budgets"]]
    definition["budgets"] = sorted({*definition["budgets"], *(row["budget"] for row in kept)}, reverse=True)
    return kept


def main(arguments: Sequence[str]) -> int:
    """0 after the record was written."""
    options = parser(__doc__)
    options.add_argument("--widths", type=float, nargs="+", default=[0.875, 0.75], help="shares of D")
    options.add_argument("--bases", nargs="+", default=["weighed", "plain"], help="how directions are chosen")
    options.add_argument("--coarse", action="store_true", help="look at damage less closely")
    asked = options.parse_args(arguments)
    if asked.model not in REFERENCES:
        options.error("a LayerScale or features would need more than is tried here: name a reference")
    clock, begun = Clock(), start(asked.model, asked.work, asked.images)
    problem, source = begun.job.problem, begun.job.source
    budgets = asked.budgets or [0.3, 0.2]
    teacher = teacher_for(problem, source)
    calibration, how = source.split("calibration"), COARSE if asked.coarse else FINE
    held_out = source.split("validation").spread(int(how.images))
    reading = read(problem.dense.module, calibration.spread(IMAGES), teacher.likelihood, problem.method.section.seed)
    measured = measure(teacher, problem.sites, problem.choices, how, calibration, held_out)
    clock.lap("damage")
    width = len(reading.moment)
    streams: list[tuple[str, Stream]] = [
        (kind, narrow(reading, round(share * width), weighed=kind == "weighed"))
        for kind in asked.bases
        for share in asked.widths
    ]
    alone = []
    for kind, stream in streams:
        narrower = Narrower.of(problem, stream)
        judged = begun.judge(shipped(begun, narrower.module, stream))
        params = narrower.problem.shape.params
        alone.append(described(stream, kind, params / problem.shape.params, {"params": params, "judged": judged}))
        print(alone[-1], flush=True)
    outcomes = []
    for params in budgets:
        for kind, each in [("", None), *streams]:
            outcomes.append(described(each, kind, params, outcome(begun, teacher, each, params, measured)))
            print({key: value for key, value in outcomes[-1].items() if key != "widths"}, flush=True)
    clock.lap("models")
    result = {
        "dense": problem.shape.params,
        "judged": begun.judge(problem.dense.module),
        "narrowed": alone,
        "outcomes": outcomes,
    }
    definition = {"budgets": budgets, "asked": IMAGES, "D": width, **asdict(how)}
    result["outcomes"] = [*others(begun, definition), *outcomes]
    record(KIND, begun, definition, result, clock.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
