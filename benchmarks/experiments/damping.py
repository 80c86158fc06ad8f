"""What it is worth that scenes decide how far a re-fit moves: the tool's own model, and one with the constants of before.

Widths are those of the tool: its allocation does not depend on these dampings. β is chosen for each as it always is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from kinds.compression import Clock

from experiments.product import compressed
from experiments.starts import BACKBONE, Start, earlier, figures, parser, record, start
from toolchain.compress.choices import key_of
from toolchain.compress.closed_form import reduce_closed_form, teacher_for
from toolchain.compress.stage import Compress
from toolchain.cost import Widths
from toolchain.model import MaskedModel, TimmModel

KIND = "damping"
BRANCHES, CLASSIFIER = 1e-3, 3e-2
"""Those of the last linears of branches, and of the classifier, as shares of the mean variance of a column."""
CHOSEN, CONSTANT = WAYS = ("by scenes", "constant")


def constant(dense: TimmModel) -> dict[str, float]:
    """Linear that is re-fitted → the constant that was its damping."""
    family, module = dense.family, dense.module
    found = {branch.reader: BRANCHES for branch in family.branches(module)}
    classifier = family.classifier(module)
    return found if classifier is None else {**found, classifier: CLASSIFIER}


def as_it_is(begun: Start, made: MaskedModel) -> dict[str, Any]:
    """What the tool leaves of the model."""
    params = begun.job.problem.costs.of(Widths.of(made.plan))["params"]
    return {"params": params, **made.plan.provenance["closed_form"], "judged": begun.by_image(made.module)}


def held_alike(begun: Start, made: MaskedModel) -> dict[str, Any]:
    """What is left at the same widths where dampings are constant."""
    source, dense, problem = begun.job.source, begun.job.dense, begun.job.problem
    widths = {**{key_of(site): site.total for site in problem.sites}, **Widths.of(made.plan).kept}
    module, teacher = copy.deepcopy(dense.module), teacher_for(problem, source)
    _, facts = reduce_closed_form(problem, teacher, module, widths, source, dampings=constant(dense))
    params = problem.costs.of(Widths(widths))["params"]
    return {"params": params, **asdict(facts), "judged": begun.by_image(module)}


def main(arguments: Sequence[str]) -> int:
    """0 after the record was written, anew after each model."""
    options = parser(__doc__)
    options.add_argument("--resume", action="store_true", help="keep the models of the record that is there")
    asked = options.parse_args(arguments)
    begun, clock = start(asked.model, asked.work, asked.images), Clock()
    definition = {"branches": BRANCHES, "classifier": CLASSIFIER}
    old = earlier(KIND, begun, definition) if asked.resume else None
    outcomes = list(old.result["outcomes"]) if old else []
    clock.seconds |= old.seconds if old else {}
    weigh = cache(lambda: Compress(begun.job.source).weigh(begun.job.problem))
    result = {
        "dense": begun.job.problem.shape.params,
        "judged": old.result["judged"] if old else begun.by_image(begun.job.dense.module),
        "outcomes": outcomes,
    }
    for params in asked.budgets or ([0.5] if begun.name == BACKBONE else [0.5, 0.3, 0.2]):
        for way in WAYS:
            if (params, way) in [(each["budget"], each["way"]) for each in outcomes]:
                continue
            made = compressed(begun, params, asked.work, weigh)
            found = as_it_is(begun, made) if way == CHOSEN else held_alike(begun, made)
            outcomes.append({"budget": params, "way": way, **found})
            clock.lap("models")
            record(KIND, begun, definition, result, clock.seconds)
            print(params, way, figures(found["judged"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
