"""A budget of bytes: one `slimvit run` within the size of the file of one precision, or of whichever does the least damage."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from records import UNALIGNED, Record, described, here, versions

from kinds.base import Cell, Kind, Outcome, Table
from kinds.compression import Clock, pack
from kinds.files import Stopwatch
from toolchain.artifacts import open_artifact
from toolchain.artifacts.onnx_file import FP32
from toolchain.errors import ArtifactError, BudgetError, RecipeError
from toolchain.export.calls import opened, step_of, tensor_call
from toolchain.files import digest_of, read_json, sha256
from toolchain.pipeline.job import begin
from toolchain.progress import Progress
from toolchain.recipe import ANY, Recipe
from toolchain.training.evaluate import accuracy

if TYPE_CHECKING:
    from engine import Bench
    from suite import File, Suite

SECONDS = 120.0
"""What a cell is predicted to take until some are recorded."""
COSTS = ("params", "macs")


class Group(Table):
    """Budgets × precisions of one dense model, and for each budget `any` of these precisions and fp32.

    Attributes:
        reference: the dense model, with the seeds of its table.
        sizes: budgets of the whole file, as `budget.size` has them.
        precisions: whose file is limited.
        calibration_images: that the method sees.
    """

    reference: str
    sizes: tuple[str, ...] = Field(min_length=1)
    precisions: tuple[str, ...] = Field(min_length=1)
    calibration_images: int = Field(gt=0)


@dataclass(frozen=True)
class SizesCell(Cell):
    """One file within one budget.

    Attributes:
        reference, seed: the dense model.
        size: of the file, as `budget.size` has it.
        precision: of the file, or "any".
        made: the precisions that the recipe makes.
        calibration_images: that the method sees.
    """

    reference: str = ""
    seed: int = 0
    size: str = ""
    precision: str = ""
    made: tuple[str, ...] = ()
    calibration_images: int = 1

    @property
    def model(self) -> str:
        """The name of the dense model, which is that of its folder."""
        return f"{self.reference}_s{self.seed}"


class Sizes(Kind[SizesCell, Group]):
    """Compresses, rounds and evaluates the file itself; a budget that no widths meet is recorded with what the tool says."""

    name = "sizes"
    group = Group

    def cells(self, group: Group, file: File, path: Path) -> list[SizesCell]:
        """The product of seeds, sizes, and precisions with `any`."""
        if group.reference not in file.references:
            raise RecipeError(f"{path}: no reference {group.reference!r}; known: {', '.join(file.references)}")
        cells = []
        for seed in file.references[group.reference].seeds:
            for size in group.sizes:
                for precision in (*group.precisions, ANY):
                    row = f"{precision}.{size.replace('%', 'pct')}"
                    made = (FP32, *group.precisions) if precision == ANY else (precision,)
                    about = (group.reference, seed, size, precision, made, group.calibration_images)
                    cells.append(SizesCell(f"{row}.{group.reference}_s{seed}", self.name, row, "", 0.0, *about))
        return cells

    def recipe(self, cell: SizesCell, suite: Suite, checkpoint: str) -> Recipe:
        """The recipe of a cell, from the reference's weights at `checkpoint`."""
        raw = suite.file.references[cell.reference].recipe
        return Recipe.from_dict(
            {
                "model": {**raw["model"], "checkpoint": checkpoint, "pretrained": False},
                "data": {**raw["data"], "calibration_images": cell.calibration_images},
                "compress": {"method": "joint", "align": UNALIGNED, "seed": cell.seed},
                "budget": {"size": {cell.precision: cell.size}},
                "export": {"precisions": list(cell.made)},
            }
        )

    def key(self, cell: SizesCell, bench: Bench, record: Record | None = None) -> str:
        """Digest of the recipe, the dense weights and all versions; without these weights here, of those that the record names."""
        ready = bench.ready(cell.reference, cell.seed)
        if ready is None and record is None:
            ready = bench.reference(cell.reference, cell.seed)
        weights = ready.weights_sha256 if ready else record.result["weights_sha256"] if record else ""
        recipe = self.recipe(cell, bench.suite, "elsewhere")
        return digest_of("benchmark sizes", described(recipe), weights, versions())

    def predict(self, todo: Sequence[SizesCell], bench: Bench, rate: float) -> dict[str, float]:
        """As long as cells of the same model took, without what they share."""
        known: dict[str, list[float]] = {}
        for cell in bench.suite.cells:
            record = bench.results.read(bench.suite.name, cell.name)
            if isinstance(cell, SizesCell) and record is not None and record.seconds:
                own = sum(spent for stage, spent in record.seconds.items() if stage != "weigh")
                known.setdefault(cell.model, []).append(own)
        return {cell.name: statistics.mean(known.get(cell.model, [SECONDS])) for cell in todo}

    def measure(self, cell: SizesCell, bench: Bench, progress: Progress) -> Outcome:
        """Carries the recipe out, beside other cells of the model, whose stages are taken over where they are the same."""
        ready = bench.reference(cell.reference, cell.seed)
        recipe = self.recipe(cell, bench.suite, str(ready.weights))
        root, watch = bench.work / "sizes" / cell.model, Stopwatch()
        folder, clock = root / cell.row, Clock()
        others = sorted(each for each in root.glob("*.*") if each.is_dir() and each != folder)
        definition = {"recipe": described(recipe), "model": cell.model, "precision": cell.precision, "size": cell.size}
        facts: dict[str, Any] = {"weights_sha256": ready.weights_sha256}
        try:
            report = bench.harness.run(recipe, folder, progress=Progress(watch), others=others).to_dict()
        except BudgetError as error:
            return Outcome(definition, {**facts, "out_of_reach": str(error)}, here(), versions())
        clock.skip()
        facts |= {"out_of_reach": "", **found(report, folder), **judged(recipe, folder, report)}
        clock.lap("judge")
        return Outcome(definition, facts, here(), versions(), watch.seconds | clock.seconds)

    def summary(self, record: Record) -> str:
        """Errors and bytes, or why there is no file."""
        result = record.result
        if result["out_of_reach"]:
            return str(result["out_of_reach"])
        test = result["test"]
        return f"{result['precision']}: {test['wrong']} of {test['total']} wrong, {result['bytes']:,} of {result['budget']:,} bytes"


def asked_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The budget, and what was predicted within it; precisions that could have been chosen and were not have none."""
    asked: Mapping[str, Any] = next(each for each in report["size_budget"] if each["requested"] is not None)
    return asked


def file_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The row of the file that the budget speaks of."""
    asked = asked_of(report)
    return next(
        row for row in report["artifacts"] if row["model"] == "compressed" and row["precision"] == asked["precision"]
    )


def found(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a run says of its file: bytes asked for, predicted and there, what is left, and the damage that was predicted."""
    asked, row, plan = asked_of(report), file_of(report), read_json(folder / "allocation.json")
    return {
        "precision": asked["precision"],
        "budget": asked["requested"],
        "predicted": asked["predicted"],
        "reachable": list(asked["reachable"]),
        "bytes": row["bytes"],
        "file_sha256": sha256(folder / row["path"]),
        **{name: report["compressed"][name] for name in COSTS},
        "dense": {name: report["dense"][name] for name in (*COSTS, "bytes")},
        "damage": {"widths": plan["damage"], "rounding": asked["rounding"]},
        "widths": plan["widths"],
        "artifacts": report["artifacts"],
    }


def judged(recipe: Recipe, folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Which test images the file and the dense fp32 file get right; raises ArtifactError if the report has another count."""
    test = begin(recipe).source.split("test")
    dense = next(row for row in report["artifacts"] if row["model"] == "dense")
    right = {}
    for name, row in (("test", file_of(report)), ("dense_test", dense)):
        path = folder / row["path"]
        with opened(row["judged_on"], path, torch.get_num_threads(), step=step_of(open_artifact(path))) as run:
            right[name] = pack(accuracy(tensor_call(run), test))
        if right[name]["wrong"] != row["wrong"]:
            raise ArtifactError(
                f"{row['path']} is wrong on {right[name]['wrong']} images now, the report has {row['wrong']}"
            )
    return right


KIND = Sizes()
