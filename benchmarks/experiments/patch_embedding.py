"""What it is worth that recovery leaves the patch embedding alone: one epoch without labels with it trained, and with it frozen.

Both begin with the same compressed model. As the tool does it, the better of the given and the trained model on validation stays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from kinds.compression import Clock

from experiments.product import compressed
from experiments.starts import BACKBONE, Start, earlier, figures, parser, record, start
from toolchain.model import MaskedModel, run_stage
from toolchain.recipe import FinetuneSection
from toolchain.training.stages import PATCHES, Finetune

KIND = "patch-embedding"
BEFORE, FROZEN, TRAINED = WAYS = ("no recovery", "frozen", "trained")
SMALL, LARGE = (0.3, 1e-3, 128), (0.5, 3e-6, 8)
"""Share of the parameters that is left, learning rate and images in a batch: of a reference, and of the backbone."""


def outcome(begun: Start, given: MaskedModel, section: FinetuneSection, way: str) -> dict[str, Any]:
    """What is left of a compressed model, after recovery unless the way is none."""
    if way == BEFORE:
        return {"way": way, "judged": begun.by_image(given.module)}
    source, dense, seed = begun.job.source, begun.job.dense, begun.job.recipe.compress.seed
    stage = Finetune(section, source, dense, seed, frozen=(PATCHES,) if way == FROZEN else ())
    made = run_stage(stage, given)
    return {"way": way, "facts": made.facts.model_dump(mode="json"), "judged": begun.by_image(made.artifact.module)}


def main(arguments: Sequence[str]) -> int:
    """0 after the record was written, anew after each way."""
    options = parser(__doc__)
    options.add_argument("--resume", action="store_true", help="keep the models of the record that is there")
    asked = options.parse_args(arguments)
    begun, clock = start(asked.model, asked.work, asked.images), Clock()
    params, lr, batch = LARGE if begun.name == BACKBONE else SMALL
    (params,) = asked.budgets or (params,)
    section = FinetuneSection(epochs=1, lr=lr, batch_size=batch, labels=False)
    definition = {"budget": params, "finetune": section.model_dump(mode="json")}
    old = earlier(KIND, begun, definition) if asked.resume else None
    outcomes = list(old.result["outcomes"]) if old else []
    clock.seconds |= old.seconds if old else {}
    given = compressed(begun, params, asked.work)
    clock.lap("compress")
    result = {
        "dense": begun.job.problem.shape.params,
        "judged": old.result["judged"] if old else begun.by_image(begun.job.dense.module),
        "outcomes": outcomes,
    }
    for way in WAYS:
        if way not in [each["way"] for each in outcomes]:
            outcomes.append({"budget": params, **outcome(begun, given, section, way)})
            clock.lap("recovery")
            record(KIND, begun, definition, result, clock.seconds)
            print(way, outcomes[-1].get("facts"), figures(outcomes[-1]["judged"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
