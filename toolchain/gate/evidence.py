"""The evidence of a cell: its request, what was read and counted, and what was timed. Nothing is judged here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from toolchain.errors import ArtifactError, DeviceLost, ParityError, SlimvitError, TargetUnavailable, WorkloadRefused
from toolchain.export.accuracy import FeatureEvaluation
from toolchain.export.agreement import Agreement
from toolchain.gate.config import MEASURED, Cell
from toolchain.gate.metrics import METRICS
from toolchain.gate.starts import COSTS, Starts
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import A, ArtifactFacts, B, Parity
from toolchain.records import Record
from toolchain.targets import TARGETS

RATIO, TIME = "relation.latency", "budget.latency"
DEFAULT_TAU = 0.05
Count = Annotated[int, Field(ge=0)]


def runtime_of(cell: Cell) -> str | None:
    """The runtime that a cell names itself; None where it names a device, whose runtime targets.toml says."""
    return cell.target if cell.target.partition("+")[0] in TARGETS else None


class Facts(Record):
    """What was read of an artifact.

    Attributes:
        file: which artifact it is.
        counts: metric → its number, for what its cell asks for.
        images: that accuracy was counted on.
        pictures: which these were.
        pictures_of_run: which the run that made the artifact has in the same split of the same source; None where that is not known.
        notes: one sentence for each thing that was assumed to count it.
    """

    file: ArtifactFacts
    counts: dict[str, Count] = Field(default_factory=dict)
    images: Count | None = None
    pictures: str | None = None
    pictures_of_run: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def split_otherwise(self) -> bool:
        """Whether the run that made the artifact may have learned from what it was judged on here."""
        return self.pictures_of_run is not None and self.pictures_of_run != self.pictures

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Facts:
        if self.counts.get("size", self.file.size_bytes) != self.file.size_bytes:
            raise ValueError(f"{self.file.name} has two sizes")
        if self.counts.get("accuracy", 0) > (self.images or 0):
            raise ValueError(f"{self.file.name} has more wrong images than images")
        return self


class Change(Record):
    """A part of an artifact, in bytes before and after; before is 0 for what is new, or without a baseline."""

    layer: str
    part: str
    before: Count
    after: Count

    @property
    def change(self) -> int:
        """Bytes after less bytes before."""
        return self.after - self.before


class Missing(Record):
    """Why there is no comparison: the target is not there or refuses the workload, the files do not fit, or measuring failed."""

    why: Literal["unavailable", "refused", "unfit", "failed"]
    reason: str

    @staticmethod
    def of(error: SlimvitError) -> Missing:
        """What an error of a measurement means."""
        if isinstance(error, WorkloadRefused):
            return Missing(why="refused", reason=error.reason)
        if isinstance(error, TargetUnavailable) and not isinstance(error, DeviceLost):
            return Missing(why="unavailable", reason=str(error))
        return Missing(why="unfit" if isinstance(error, ParityError | ArtifactError) else "failed", reason=str(error))


class Evidence(Record):
    """One cell.

    Attributes:
        cell: what gate.toml asks, with the name of the artifact for its path, and with the threads and cores that
            targets.toml names where the cell names none.
        artifact: what was read of the artifact.
        baseline: of its baseline, if it names one.
        agreement: of the outputs of both, if parity is asked for.
        prepared_otherwise: in which keys the artifact and its baseline declare another preparation of images, if parity is asked
            for, but for keys that [data] has. Parity has failed then: the outputs agree for equal inputs alone.
        features: those of the artifact against the baseline's, if that is asked for.
        unjudged: check → why outputs do not let it be judged: those of the artifact, or for a relation of its baseline.
        changes: which parts of the artifact changed their size, if that was asked for.
        built: whether the job built the baseline itself, so that no digest was held.
        starts: cold starts of the artifact and its baseline, or why there are none, if something is asked that they tell; a second time
            where the first said that they cost too much.
        attempts: the comparison, or why there is none; a second one where the first said that the artifact is too slow.
    """

    cell: Cell
    artifact: Facts
    baseline: Facts | None = None
    agreement: Agreement | None = None
    prepared_otherwise: tuple[str, ...] = ()
    features: FeatureEvaluation | None = None
    unjudged: dict[str, str] = Field(default_factory=dict)
    changes: tuple[Change, ...] | None = None
    built: bool = False
    starts: tuple[Starts | Missing, ...] = ()
    attempts: tuple[Comparison | Missing, ...] = ()

    @property
    def latency_checks(self) -> tuple[str, ...]:
        """Those of TIME and RATIO that the cell asks for."""
        return tuple(name for name in (TIME, RATIO) if name in self.cell.checks)

    @property
    def cost_checks(self) -> tuple[str, ...]:
        """Those checks of the cell that take cold starts."""
        return tuple(name for name in self.cell.checks if name.partition(".")[2] in COSTS)

    @property
    def parity(self) -> Parity | Literal["fail"]:
        """What is proven about the artifact and its baseline."""
        bounds, agreement = self.cell.relation.parity, self.agreement
        if bounds is None or agreement is None:
            return "not claimed"
        rung = agreement.rung
        held = rung.verdict == "pass" and (rung.cosine_min is None or rung.cosine_min >= bounds.cosine_min)
        return "pass" if held and not self.prepared_otherwise else "fail"

    @property
    def to_time(self) -> bool:
        """Whether latency is asked for, and of an artifact whose parity did not fail."""
        return bool(self.latency_checks) and self.parity != "fail"

    @property
    def to_start(self) -> bool:
        """Whether cold starts are asked for, and of an artifact whose parity did not fail."""
        return bool(self.cost_checks) and self.parity != "fail"

    @property
    def of_one_file(self) -> bool:
        """Whether the artifact holds the same bytes as its baseline."""
        return self.baseline is not None and self.artifact.file.sha256 == self.baseline.file.sha256

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Those of the attempts that gave one."""
        return tuple(each for each in self.attempts if isinstance(each, Comparison))

    def basis(self, check: str) -> str | None:
        """What a value of one of the checks says nothing without: the baseline of a ratio, or the pictures that were counted."""
        kind, _, metric = check.partition(".")
        if metric == "accuracy":
            return self.artifact.pictures
        return self.baseline.file.sha256 if kind == "relation" and metric in MEASURED and self.baseline else None

    def workload(self, check: str) -> str | None:
        """Where and on what one of the checks is measured, in words; None of what is counted."""
        if check.partition(".")[2] not in MEASURED:
            return None
        cell = self.cell
        cores = cell.affinity and f"cores {', '.join(map(str, cell.affinity))}"
        shape = cell.input_shape and f"input {'x'.join(map(str, cell.input_shape))}"
        parts = (cell.target, f"batch {cell.batch}", f"threads {cell.threads}", cores, shape)
        return ", ".join(part for part in parts if part)

    @property
    def tau(self) -> float:
        """The tolerance that the cell is measured at."""
        return self.cell.relation.latency or DEFAULT_TAU

    @model_validator(mode="after")
    def _is_of_the_cell(self) -> Evidence:
        if (fault := next(self._faults(), None)) is not None:
            raise ValueError(f"cell {self.cell.name!r}: {fault}")
        return self

    def _faults(self) -> Iterator[str]:
        """What does not fit together."""
        cell, ours, theirs = self.cell, self.artifact, self.baseline
        if bool(cell.baseline) != (theirs is not None):
            yield "a baseline is named or was read, and not both"
        if others := [name for name in self.unjudged if name not in cell.checks]:
            yield f"{others[0]} was not asked for"
        asked = [name for name in cell.checks if name not in self.unjudged]
        for kind, metric in (name.split(".") for name in asked):
            sides = (ours, theirs) if kind == "relation" else (ours,)
            if metric in METRICS and not all(side and metric in side.counts for side in sides):
                yield f"{metric} was not counted"
        if "relation.accuracy" in asked and theirs and ours.images != theirs.images:
            yield f"{ours.images} images for the artifact, {theirs.images} for its baseline"
        bounds, rung = cell.relation.parity, self.agreement and self.agreement.rung
        if (bounds and bounds.tolerance) != (rung and rung.tolerance):
            yield "parity was not judged by what gate.toml allows"
        if ("relation.features" in asked) != (self.features is not None):
            yield "features were asked for or judged, and not both"
        gained = ours.file.size_bytes - (theirs.file.size_bytes if theirs else 0)
        if self.changes is not None and sum(row.change for row in self.changes) != gained:
            yield f"the sizes of its parts do not sum to {gained:,} bytes"
        for starts in self.starts:
            if isinstance(starts, Starts):
                yield from self._faults_of_starts(starts)
        if any(isinstance(each, Missing) for each in (*self.attempts[:-1], *self.starts[:-1])):
            yield "nothing was measured, and yet confirmed"
        for seed, attempt in enumerate(self.attempts):
            if isinstance(attempt, Comparison):
                workload, design = attempt.scenario, attempt.design
                for what, measured, wanted in (
                    ("target", workload.target, runtime_of(cell) or workload.target),
                    ("artifact", attempt.artifacts[B], ours.file),
                    ("baseline", attempt.artifacts[A], (theirs or ours).file),
                    ("batch", workload.batch, cell.batch),
                    ("number of threads", workload.threads, cell.threads),
                    ("set of cores", workload.affinity, cell.affinity),
                    ("tolerance", design.tau, self.tau),
                    ("seed", design.seed, seed),
                    ("parity", attempt.parity, self.parity),
                ):
                    if measured != wanted:
                        yield f"it was measured with another {what}, {measured} instead of {wanted}"

    def _faults_of_starts(self, starts: Starts) -> Iterator[str]:
        """What does not fit the cell in its cold starts."""
        cell, scenario = self.cell, starts.scenario
        related = any(name.startswith("relation.") for name in self.cost_checks)
        for what, measured, wanted in (
            ("target", scenario.target, runtime_of(cell) or scenario.target),
            ("artifact", starts.artifact, self.artifact.file),
            ("baseline", starts.baseline, self.baseline.file if self.baseline and related else None),
            ("batch", scenario.batch, cell.batch),
            ("number of threads", scenario.threads, cell.threads),
            ("set of cores", scenario.affinity, cell.affinity),
        ):
            if measured != wanted:
                yield f"it was started with another {what}, {measured} instead of {wanted}"
