"""What it is worth that scenes decide how far a re-fit moves: the tool's own model, and one with the constants of before.

Widths are those of the tool: its allocation does not depend on these dampings. β is chosen for each as it always is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kinds.compression import Clock

from experiments.product import compressed
from experiments.starts import BACKBONE, Start, earlier, figures, parser, record, start, within
from toolchain.compress.closed_form import reduce_closed_form, teacher_for
from toolchain.compress.stage import Compress, Weighing
from toolchain.cost import Widths
from toolchain.model import TimmModel

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


def as_it_is(begun: Start, weighing: Weighing, params: float, work: Path) -> dict[str, Any]:
    """What the tool leaves of the model."""
    made = compressed(begun, params, work, weighing)
    chosen: dict[str, Any] = dict(made.plan.provenance["closed_form"])
    return {
        "params": begun.job.problem.costs.of(Widths.of(made.plan))["params"],
        **chosen,
        "judged": begun.by_image(made.module),
    }


def held_alike(begun: Start, weighing: Weighing, params: float) -> dict[str, Any]:
    """What is left of the model where dampings are constant."""
    source, dense = begun.job.source, begun.job.dense
    chosen, teacher = Compress(source, weighing=weighing).decide(within(begun.job.problem, params))
    teacher = teacher or teacher_for(chosen.problem, source)
    module, widths, dampings = copy.deepcopy(dense.module), chosen.widths.kept, constant(dense)
    _, facts = reduce_closed_form(chosen.problem, teacher, module, widths, source, dampings=dampings)
    return {"params": chosen.predicted.params, **asdict(facts), "judged": begun.by_image(module)}


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
    weighing = Compress(begun.job.source).weigh(begun.job.problem)
    clock.lap("damage")
    result = {
        "dense": begun.job.problem.shape.params,
        "judged": old.result["judged"] if old else begun.by_image(begun.job.dense.module),
        "outcomes": outcomes,
    }
    for params in asked.budgets or ([0.5] if begun.name == BACKBONE else [0.5, 0.3, 0.2]):
        for way in WAYS:
            if (params, way) in [(each["budget"], each["way"]) for each in outcomes]:
                continue
            if way == CHOSEN:
                made = as_it_is(begun, weighing, params, asked.work)
            else:
                made = held_alike(begun, weighing, params)
            outcomes.append({"budget": params, "way": way, **made})
            clock.lap("models")
            record(KIND, begun, definition, result, clock.seconds)
            print(params, way, figures(made["judged"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
