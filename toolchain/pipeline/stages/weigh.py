"""`damage.json`: the damage of each width of each layer to the dense model's outputs, for any budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolchain.compress.sensitivity import Teacher
from toolchain.compress.solver import Candidate
from toolchain.compress.stage import Compress, Weighing
from toolchain.files import read_json, sha256, write_json
from toolchain.model import Made, TimmModel
from toolchain.pipeline.folder import Nothing, Written
from toolchain.pipeline.stages.base import Run, RunStage

SCHEMA = "slimvit.damage/1"
COLUMNS = ("module", "unit", "kept", "damage")


@dataclass
class Weighed(RunStage[Nothing]):
    """The damage of widths, in nats an image; runs that differ in their budget alone share it.

    Attributes:
        teacher: what it was weighed with, where that was done now.
    """

    run: Run
    dense: TimmModel
    teacher: Teacher | None = field(default=None, init=False)
    name = "weigh"
    facts = Nothing

    @property
    def inputs(self) -> Sequence[Any]:
        job, folder = self.run.job, self.run.root / "dense"
        return [
            sha256(folder / "model.safetensors"),
            sha256(folder / "model.json"),
            job.recipe.compress.model_dump(mode="json"),
            dict(job.problem.choices.multiples),
            job.source.digest,
        ]

    @property
    def entries(self) -> Iterable[object]:
        return self.run.job.problem.method.entries

    def work(self, key: str) -> Made[Written, Nothing]:  # noqa: ARG002
        job = self.run.job
        stage = Compress(job.source, progress=self.run.progress)
        weighing = stage.weigh(replace(job.problem, dense=self.dense))
        self.teacher = weighing.teacher
        rows = [
            (*each.key, each.kept, each.damage if math.isfinite(each.damage) else None) for each in weighing.candidates
        ]
        write_json(self.path, {"schema": SCHEMA, "candidates": [dict(zip(COLUMNS, row, strict=True)) for row in rows]})
        return Made((self.path,), Nothing())

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.run.root / "damage.json"

    def weighing(self) -> Weighing:
        """Reads damage.json. Gives up the reference to the teacher, so that it can be freed; a second call returns None for it."""
        rows = ([row[name] for name in COLUMNS] for row in read_json(self.path)["candidates"])
        candidates = [
            Candidate((module, unit), kept, math.inf if damage is None else damage)
            for module, unit, kept, damage in rows
        ]
        teacher, self.teacher = self.teacher, None
        return Weighing(candidates, teacher)
