"""The recorded cells of a suite as rows beside their dense model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from kinds.compression import CompressionCell, unpack
from records import Record
from suite import Suite

from pages.stats import Estimate, Wrong, paired_difference, relative_increase
from toolchain.errors import ArtifactError


@dataclass(frozen=True)
class Row:
    """The recorded cells that differ in their seed alone, in the order of the seeds."""

    cells: tuple[Record, ...]
    wanted: int

    @property
    def name(self) -> str:
        """The row's name in the suite."""
        return str(self.cells[0].definition["row"])

    @property
    def training(self) -> str:
        """Whether it was trained after: "zero" or "recovered"."""
        return str(self.cells[0].definition["training"])

    @property
    def reference(self) -> str:
        """The dense model."""
        return str(self.cells[0].definition["reference"])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that have been measured."""
        return tuple(record.definition["seed"] for record in self.cells)

    @cached_property
    def wrong(self) -> dict[int, Wrong]:
        """Seed → bool [images], True where the model is wrong on the test split."""
        return {record.definition["seed"]: ~unpack(record.result["test"]) for record in self.cells}

    def left(self, what: str) -> float:
        """The mean share of "params", "macs" or "bytes" that is left."""
        return float(statistics.mean(record.result[what] / record.result["dense"][what] for record in self.cells))


@dataclass(frozen=True)
class Table:
    """A suite's recorded cells, as rows beside their dense model."""

    suite: Suite
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        """Raise ArtifactError where records of one reference and seed were made from different dense models."""
        models: dict[tuple[str, int], Record] = {}
        for record in self.records:
            first = models.setdefault((record.definition["reference"], record.definition["seed"]), record)
            if record.result.get("weights_sha256") != first.result.get("weights_sha256"):
                raise ArtifactError(
                    f"{self.suite.name}: {first.cell} and {record.cell} were measured from different dense models; "
                    "measure the older of the two again"
                )

    @cached_property
    def rows(self) -> list[Row]:
        """The rows in the suite's order; tries of a sweep are not among them."""
        grouped: dict[tuple[str, str, str], list[Record]] = {}
        for record in self.records:
            if not record.definition["sweep"]:
                key = (record.definition["reference"], record.definition["training"], record.definition["row"])
                grouped.setdefault(key, []).append(record)
        cells = [cell for cell in self.suite.cells if isinstance(cell, CompressionCell)]
        counts = {key: sum((c.reference, c.training, c.row) == key for c in cells) for key in grouped}
        return [Row(tuple(records), counts[key]) for key, records in grouped.items()]

    def row(self, reference: str, training: str, name: str) -> Row | None:
        """One row, if any of its cells is recorded."""
        wanted = (reference, training, name)
        return next((row for row in self.rows if (row.reference, row.training, row.name) == wanted), None)

    def increases(self, row: Row) -> list[float]:
        """The relative error increase of each seed."""
        dense = self.row(row.reference, "zero", "dense")
        if dense is None:
            return []
        shared = [seed for seed in row.seeds if seed in dense.seeds]
        return [relative_increase(int(row.wrong[s].sum()), int(dense.wrong[s].sum())) for s in shared]

    def difference(self, row: Row, other: Row) -> Estimate | None:
        """How much more a row adds to the dense model's errors than another, over the seeds that all have."""
        dense = self.row(row.reference, "zero", "dense")
        if dense is None:
            return None
        shared = [seed for seed in row.seeds if seed in other.seeds and seed in dense.seeds]
        if not shared:
            return None
        stacked = [np.stack([each.wrong[seed] for seed in shared]) for each in (row, other, dense)]
        return paired_difference(*stacked)

    def against_dense(self, row: Row) -> Estimate | None:
        """The relative error increase with its interval."""
        dense = self.row(row.reference, "zero", "dense")
        return None if dense is None else self.difference(row, dense)
