"""What an attention is worth whose parts shrink apart: by damage measured part by part, then by whole models.

For each way to shrink it the knapsack of `joint` picks widths from damages that are measured alike, at equal parameters. What is
predicted is the sum of damages; what is real is the model that the sequential pass of `joint` makes of these widths.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kinds.compression import Clock
from records import Results

from experiments.halves import FORMS, parts_of, register
from experiments.starts import BACKBONE, NAME, RESULTS, Start, parser, record, start
from toolchain.compress.allocation import Allocation, allocate
from toolchain.compress.choices import Budget, key_of
from toolchain.compress.closed_form import IMAGES, SHARES, reduce_closed_form, teacher_for
from toolchain.compress.damage import Effort, measure
from toolchain.compress.method import HEAD_DIM, HIDDEN
from toolchain.compress.problem import Problem
from toolchain.compress.sensitivity import Teacher
from toolchain.compress.solver import Candidate, interpolate, solve_uniform
from toolchain.recipe import BudgetSection

FINE = Effort(SHARES[0], len(SHARES[0]), IMAGES[1])
COARSE, FITTED = Effort(SHARES[1], 2, IMAGES[0]), 64
"""How closely damage is looked at: of a small model; and of the backbone, and the images that its statistics are then of."""
BAR = 0.9
"""The most that a way may be predicted to cost, as a share of the tied one, for its whole model to be made unasked."""
KIND, TIED = "freer-attention", next(iter(FORMS))


def freed(problem: Problem, form: str, params: float) -> Problem:
    """The problem with the units that a way to shrink attention has, within another budget."""
    groups = []
    for group in problem.choices.groups:
        every = [group, *parts_of(group)] if group.unit == HEAD_DIM else [group]
        groups += [each for each in every if each.unit in (*FORMS[form], HIDDEN)]
    multiples = {"whole_heads": next(g.total for g in problem.choices.groups if g.unit == HEAD_DIM)}
    choices = replace(problem.choices, groups=groups, multiples={**problem.choices.multiples, **multiples})
    costs = replace(problem.costs, groups=tuple(groups))
    request = BudgetSection(params=params)
    budget = Budget.of(request, costs)
    uniform = solve_uniform(choices, costs, budget)
    return replace(
        problem, request=request, choices=choices, sites=tuple(groups), costs=costs, budget=budget, uniform=uniform
    )


def settled(problem: Problem, measured: Sequence[Candidate]) -> Allocation:
    """The knapsack's widths, by those damages that are of the problem's units."""
    keys = {key_of(site) for site in problem.sites}
    own = [candidate for candidate in measured if candidate.key in keys]
    return allocate(problem, interpolate(own, problem.sites, problem.choices, SHARES[0]))


@dataclass(frozen=True)
class Trial:
    """One model with the damages of its parts; ways that are looked at are `forms`, the tied one first."""

    begun: Start
    forms: Sequence[str]
    teacher: Teacher
    measured: Sequence[Candidate]

    @staticmethod
    def of(begun: Start, forms: Sequence[str]) -> Trial:
        """Measures the damages."""
        problem, source = begun.job.problem, begun.job.source
        every = [freed(problem, form, 1.0) for form in forms]
        sites = list({key_of(site): site for each in every for site in each.sites}.values())
        choices = replace(problem.choices, groups=sites, multiples=every[0].choices.multiples)
        teacher, calibration, how = teacher_for(problem, source), source.split("calibration"), FINE
        if begun.name == BACKBONE:
            calibration, how = calibration.spread(FITTED), COARSE
        held_out = source.split("validation").spread(int(how.images))
        return Trial(begun, forms, teacher, measure(teacher, sites, choices, how, calibration, held_out))

    def predicted(self, form: str, params: float) -> tuple[Problem, Allocation]:
        """What the knapsack picks."""
        problem = freed(self.begun.job.problem, form, params)
        return problem, settled(problem, self.measured)

    def outcomes(self, params: float) -> list[dict[str, Any]]:
        """What every way is predicted to cost, without a whole model."""
        rows: list[dict[str, Any]] = []
        for form in self.forms:
            _, chosen = self.predicted(form, params)
            rows.append(
                {
                    "form": form,
                    "budget": params,
                    "params": chosen.predicted.params,
                    "predicted": sum(chosen.damage.values()),
                    "widths": [[*key, kept] for key, kept in chosen.widths.kept.items()],
                }
            )
        return rows

    def whole(self, form: str, params: float) -> dict[str, Any]:
        """What is left of a whole model."""
        problem, chosen = self.predicted(form, params)
        module = copy.deepcopy(problem.dense.module)
        _, facts = reduce_closed_form(problem, self.teacher, module, chosen.widths.kept, self.begun.job.source)
        return {"beta": facts.beta, "judged": self.begun.judge(module)}


def main(arguments: Sequence[str]) -> int:
    """0 after the record was written: first with what is predicted, then again after each whole model."""
    options = parser(__doc__)
    options.add_argument("--forms", nargs="+", default=list(FORMS), help="ways that are looked at, the tied one first")
    options.add_argument(
        "--models", nargs="*", help="those whose whole models are made; by default, where any passes the bar"
    )
    options.add_argument("--again", action="store_true", help="take forms and damages from the record that is there")
    asked = options.parse_args(arguments)
    register()
    clock, begun = Clock(), start(asked.model, asked.work, asked.images)
    large = begun.name == BACKBONE
    budgets = asked.budgets or ([0.5, 0.35] if large else [0.5, 0.3, 0.2])
    how = COARSE if large else FINE
    definition = {"budgets": budgets, "fitted": FITTED if large else None, **asdict(how)}
    if asked.again:
        old = Results(RESULTS).read(NAME, f"{KIND}.{begun.name}")
        if old is None:
            options.error(f"there is no record of {begun.name} to take damages from: leave --again out")
        known = [Candidate((module, unit), kept, damage) for module, unit, kept, damage in old.result["damages"]]
        forms = list(dict.fromkeys(row["form"] for row in old.result["outcomes"]))
        trial = Trial(begun, forms, teacher_for(begun.job.problem, begun.job.source), known)
        clock.seconds["damage"] = old.seconds["damage"]
    else:
        trial = Trial.of(begun, asked.forms)
        clock.lap("damage")
    if asked.again and (changed := [name for name, value in definition.items() if old.definition.get(name) != value]):
        options.error(
            f"the record that is there has another {', '.join(changed)}: leave --again out, or ask for the same"
        )
    rows = [row for params in budgets for row in trial.outcomes(params)]
    if asked.again:  # whole models that are recorded stay
        made = {(row["budget"], row["form"]): row for row in old.result["outcomes"]}
        rows = [{**made.get((row["budget"], row["form"]), {}), **row} for row in rows]
    result = {
        "dense": begun.job.problem.shape.params,
        "damages": [[*each.key, each.kept, each.damage] for each in trial.measured],
        "outcomes": rows,
        "judged": old.result["judged"] if asked.again else {},
    }
    record(KIND, begun, definition, result, clock.seconds)
    for params in budgets:
        here = {row["form"]: row for row in rows if row["budget"] == params}
        print(params, {form: row["predicted"] for form, row in here.items()}, flush=True)
        passing = [form for form in trial.forms[1:] if here[form]["predicted"] <= BAR * here[TIED]["predicted"]]
        for form in [TIED, *passing] if asked.models is None and passing else asked.models or []:
            here[form] |= trial.whole(form, params)
            result["judged"] = result["judged"] or begun.judge(begun.job.dense.module)
            clock.lap("models")
            record(KIND, begun, definition, result, clock.seconds)
            print(form, here[form]["judged"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
