"""What a gate knows of a cell: what was asked there, what was read and counted, and what was timed. Nothing is judged here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from toolchain.errors import ArtifactError, DeviceLost, ParityError, SlimvitError, TargetUnavailable
from toolchain.export.agreement import Agreement
from toolchain.gate.config import Cell
from toolchain.gate.metrics import METRICS
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import A, ArtifactFacts, B, Parity, Strict

RATIO, TIME = "relation.latency", "budget.latency"
DEFAULT_TAU = 0.05
Count = Annotated[int, Field(ge=0)]


class Facts(Strict):
    """What was read of an artifact.

    Attributes:
        file: which artifact it is.
        counts: metric → its number, for what its cell asks for.
        images: that accuracy was counted on.
        notes: one sentence for each thing that was assumed to count it.
    """

    file: ArtifactFacts
    counts: dict[str, Count] = Field(default_factory=dict)
    images: Count | None = None
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Facts:
        if self.counts.get("size", self.file.size_bytes) != self.file.size_bytes:
            raise ValueError(f"{self.file.name} has two sizes")
        if ("accuracy" in self.counts) != (self.images is not None) or self.counts.get("accuracy", 0) > (
            self.images or 0
        ):
            raise ValueError(f"{self.file.name} has more wrong images than images")
        return self


class Change(Strict):
    """A part of an artifact, in bytes before and after; before is 0 for what is new, or without a baseline."""

    layer: str
    part: str
    before: Count
    after: Count

    @property
    def change(self) -> int:
        """Bytes gained."""
        return self.after - self.before


class Missing(Strict):
    """Why there is no comparison: the target is not there, the artifacts cannot be compared, or measuring failed."""

    why: Literal["unavailable", "unfit", "failed"]
    reason: str

    @staticmethod
    def of(error: SlimvitError) -> Missing:
        """What an error of a measurement means."""
        if isinstance(error, TargetUnavailable) and not isinstance(error, DeviceLost):
            return Missing(why="unavailable", reason=str(error))
        return Missing(why="unfit" if isinstance(error, ParityError | ArtifactError) else "failed", reason=str(error))


class Evidence(Strict):
    """One cell.

    Attributes:
        cell: what gate.toml asks, with the name of the artifact for its path, and with the threads and cores that
            targets.toml names where the cell names none.
        artifact: what was read of the artifact.
        baseline: of its baseline, if it names one.
        agreement: of the outputs of both, if parity is asked for.
        changes: which parts of the artifact changed their size, if that was asked for.
        attempts: the comparison, or why there is none; a second one where the first said that the artifact is too slow.
    """

    cell: Cell
    artifact: Facts
    baseline: Facts | None = None
    agreement: Agreement | None = None
    changes: tuple[Change, ...] | None = None
    attempts: tuple[Comparison | Missing, ...] = ()

    @property
    def latency_checks(self) -> tuple[str, ...]:
        """Those of TIME and RATIO that the cell asks for."""
        return tuple(name for name in (TIME, RATIO) if name in self.cell.checks)

    @property
    def parity(self) -> Parity | Literal["fail"]:
        """What is proven about the artifact and its baseline."""
        bounds, agreement = self.cell.relation.parity, self.agreement
        if bounds is None or agreement is None:
            return "not claimed"
        rung = agreement.rung
        held = rung.verdict == "pass" and (rung.cosine_min is None or rung.cosine_min >= bounds.cosine_min)
        return "pass" if held else "fail"

    @property
    def to_time(self) -> bool:
        """Whether latency is asked for, and of an artifact whose parity did not fail."""
        return bool(self.latency_checks) and self.parity != "fail"

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Those of the attempts that gave one."""
        return tuple(each for each in self.attempts if isinstance(each, Comparison))

    @property
    def tau(self) -> float:
        """The tolerance that the cell is measured at."""
        return self.cell.relation.latency or DEFAULT_TAU

    @model_validator(mode="after")
    def _is_of_the_cell(self) -> Evidence:
        cell, where = self.cell, f"cell {self.cell.name!r}"
        if bool(cell.baseline) != (self.baseline is not None):
            raise ValueError(f"{where}: a baseline is named, or read, and not both")
        for kind, metric in (name.split(".") for name in cell.checks):
            sides = (self.artifact, self.baseline) if kind == "relation" else (self.artifact,)
            if metric in METRICS and not all(side is not None and metric in side.counts for side in sides):
                raise ValueError(f"{where}: {metric} was not counted")
        if cell.relation.accuracy is not None and self.baseline and self.artifact.images != self.baseline.images:
            raise ValueError(
                f"{where}: {self.artifact.images} images for the artifact, {self.baseline.images} for its baseline"
            )
        bounds, rung = cell.relation.parity, self.agreement and self.agreement.rung
        if (bounds and bounds.tolerance) != (rung and rung.tolerance):
            raise ValueError(f"{where}: parity was not judged by what gate.toml allows")
        if self.changes is not None:
            gained = self.artifact.file.size_bytes - (self.baseline.file.size_bytes if self.baseline else 0)
            if sum(row.change for row in self.changes) != gained:
                raise ValueError(f"{where}: the sizes of its parts do not sum to {gained:,} bytes")
        if self.attempts and not self.to_time:
            raise ValueError(f"{where}: there is a measurement that nothing asked for")
        if len(self.attempts) > 2 or any(isinstance(each, Missing) for each in self.attempts[:-1]):
            raise ValueError(f"{where}: there are more measurements than one and its confirmation")
        for seed, attempt in enumerate(self.attempts):
            if isinstance(attempt, Comparison):
                self._require_own(attempt, seed)
        return self

    def _require_own(self, comparison: Comparison, seed: int) -> None:
        """Raises ValueError unless a comparison is the one of this cell's artifacts, workload and attempt."""
        cell, scenario, design = self.cell, comparison.scenario, comparison.design
        facts = {
            "artifact": (comparison.artifacts[B], self.artifact.file),
            "baseline": (comparison.artifacts[A], (self.baseline or self.artifact).file),
            "batch, threads and cores": (
                (scenario.batch, scenario.threads, scenario.affinity),
                (cell.batch, cell.threads, cell.affinity),
            ),
            "tolerance": (design.tau, self.tau),
            "seed": (design.seed, seed),
            "parity": (comparison.parity, self.parity),
        }
        for name, (measured, wanted) in facts.items():
            if measured != wanted:
                raise ValueError(f"cell {cell.name!r} was measured with another {name}: {measured} instead of {wanted}")
