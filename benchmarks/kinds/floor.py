"""Two shapes of a model beside the time of their matrix products alone. On a quiet machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from records import Record, versions

from kinds.base import Outcome
from kinds.pair import Pair, PairCell, same_sizes
from toolchain.analysis.floor import DESIGN
from toolchain.analysis.realised import SCHEMA, Floor
from toolchain.errors import ArtifactError, StorageError
from toolchain.measure import stored
from toolchain.progress import Progress

if TYPE_CHECKING:
    from engine import Bench


class FloorKind(Pair):
    """How close latencies come to their matrix products, with raw samples; at the design of `slimvit bench floor`."""

    name = "floor"
    design = ("target", "batch", "threads")

    def is_current(self, cell: PairCell, record: Record, bench: Bench) -> bool:
        """As of a pair; a floor whose control supports no statement is measured again."""
        try:
            floor = floor_of(record)
        except (ArtifactError, StorageError):
            return False
        return floor.is_valid and same_sizes(floor.artifacts, self.files(cell, bench))

    def measure(self, cell: PairCell, bench: Bench, progress: Progress) -> Outcome:
        """Times the two files and their products."""
        floor: Floor = bench.harness.floor(*self.files(cell, bench), *self.how(cell, DESIGN), progress)
        return Outcome(self.definition_of(cell), floor.to_dict(), floor.environment, versions())

    def summary(self, record: Record) -> str:
        """Whether it holds."""
        return "valid" if record.result["valid"] else "not valid"


def floor_of(record: Record) -> Floor:
    """The floor of a record, recomputed from its samples; raises ArtifactError if its statistics do not follow."""
    return stored.recomputed(record.result, f"{record.suite}/{record.cell}", SCHEMA, Floor.model_validate_json)


KIND = FloorKind()
