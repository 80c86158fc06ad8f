"""One model as every file that ships: a recipe carried out whole by one `slimvit run`. On a quiet machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from records import Record, described, here, versions

from kinds.base import Cell, Kind, Outcome, Table
from kinds.pair import outcome_of
from toolchain.files import digest_of
from toolchain.measure.comparison import Comparison
from toolchain.progress import Nobody, Progress
from toolchain.recipe import Recipe

if TYPE_CHECKING:
    from engine import Bench
    from suite import File

REPORTED = ("model", "data", "artifacts", "engines", "files", "parity")
"""What of a run's report is recorded; its latencies are records of their own."""
SECONDS = 900.0
"""What a run is predicted to take until some are recorded."""


class Group(Table):
    """Recipes, by their paths from the suite's folder; the cells have their names, or that of the folder of a `recipe.toml`."""

    recipes: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class FilesCell(Cell):
    """One recipe."""

    recipe: Path = Path()


class Files(Kind[FilesCell, Group]):
    """A whole run: its files, their parity, and beside it a record of each comparison that it made."""

    name = "files"
    group = Group

    def cells(self, group: Group, file: File, path: Path) -> list[FilesCell]:
        """One for each recipe."""
        recipes = [path.parent / each for each in group.recipes]
        names = [each.parent.name if each.stem == "recipe" else each.stem for each in recipes]
        return [FilesCell(name, self.name, name, recipe=each) for name, each in zip(names, recipes, strict=True)]

    def key(self, cell: FilesCell, bench: Bench, record: Record | None = None) -> str:
        """Digest of the recipe and all versions."""
        return digest_of("benchmark files", described(Recipe.load(cell.recipe)), versions())

    def predict(self, todo: Sequence[FilesCell], bench: Bench, rate: float) -> dict[str, float]:
        """As long as it took before."""
        before = {cell.name: bench.results.read(bench.suite.name, cell.name) for cell in todo}
        return {name: sum(record.seconds.values()) if record else SECONDS for name, record in before.items()}

    def measure(self, cell: FilesCell, bench: Bench, progress: Progress) -> Outcome:
        """Carries the recipe out."""
        recipe, folder, watch = Recipe.load(cell.recipe), bench.work / "runs" / cell.name, Stopwatch()
        report = bench.harness.run(recipe, folder, progress=Progress(watch), compare=bench.harness.compare).to_dict()
        definition, beside = {"recipe": described(recipe)}, {}
        for path in sorted((folder / "bench").glob("*.json")):
            comparison = Comparison.load(path)
            scenario = comparison.scenario
            how = {"target": scenario.target, "batch": scenario.batch, "threads": scenario.threads}
            beside[path.stem, "pair"] = outcome_of(comparison, {**definition_of(path.stem), **how})
        result = {name: report[name] for name in REPORTED}
        return Outcome(definition, result, here(), versions(), watch.seconds, beside)

    def summary(self, record: Record) -> str:
        """How many files there are."""
        return f"{len(record.result['files'])} files"


def definition_of(name: str) -> dict[str, str]:
    """What a comparison of a run holds against each other, by the name of its file: TARGET.PRECISION.bN.tN."""
    precision = name.split(".")[1]
    if precision == "int8":  # of the two kinds of int8 with each other
        return {"a": "compressed int8-dynamic", "b": "compressed int8-qdq"}
    return {"a": "dense fp32", "b": f"compressed {precision}"}


class Stopwatch(Nobody):
    """How long every step of a run took, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def done(self, name: str, seconds: float, *, reused: bool) -> None:
        """A step ended: what it took when it was carried out, now or in the run that was taken up again."""
        self.seconds[name] = seconds
        print(f"{time.strftime('%H:%M:%S')} {name}: {seconds:.1f} s", flush=True)


KIND = Files()
