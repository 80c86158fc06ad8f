"""What a gate found: checks, cells, the verdict over all of them, and the exit code that follows."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from toolchain.artifact import read_json
from toolchain.bench.gate.accepts import AcceptUse
from toolchain.bench.gate.judgement import RATIO, TIME, estimate_of, judgement_of
from toolchain.bench.protocol import Comparison
from toolchain.bench.samples import ArtifactFacts, explain
from toolchain.errors import ArtifactError

SCHEMA: Literal["slimvit.gate/1"] = "slimvit.gate/1"
Status = Literal["pass", "fail", "accepted", "inconclusive", "invalid", "skipped"]
GateVerdict = Literal["pass", "fail", "inconclusive"]
Unit = Literal["bytes", "parameters", "nodes", "wrong images", "ms", "ratio", "cosine"]
EXIT_CODES: dict[GateVerdict, int] = {"pass": 0, "fail": 1, "inconclusive": 4}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)  # a file holds computed fields too


class Check(_Strict):
    """One budget or relation of one cell. All but a cosine are better lower.

    Attributes:
        name: "budget.size", "relation.latency".
        status: what came of it.
        unit: of the numbers.
        value: of the artifact; for "relation.latency" the ratio of times, artifact over baseline.
        limit: what the value may be at most (a cosine: at least).
        baseline: of the baseline; None for a budget.
        lo: lower confidence bound of a measured value.
        hi: upper confidence bound of a measured value.
        p_value: of a latency check, one-sided: how likely samples like these are if the limit is kept.
        reason: one sentence for a reader.
    """

    name: str
    status: Status
    unit: Unit
    value: float | int | None = None
    limit: float | int | None = None
    baseline: float | int | None = None
    lo: float | None = None
    hi: float | None = None
    p_value: float | None = None
    reason: str = ""

    @property
    def acceptable_up_to(self) -> float | int | None:
        """The value that an accept of this check would cover: the upper bound where there is one."""
        return self.value if self.hi is None else self.hi


class Change(_Strict):
    """A part of an artifact, in bytes before and after; before is 0 for what is new, or without a baseline."""

    layer: str
    part: str
    before: int
    after: int

    @property
    def change(self) -> int:
        """Bytes gained."""
        return self.after - self.before


class CellResult(_Strict):
    """One cell: what was judged, the checks, what the size is made of, and the measurements with raw samples."""

    name: str
    target: str
    batch: int
    threads: int
    artifact: ArtifactFacts
    baseline: ArtifactFacts | None
    checks: tuple[Check, ...]
    why: tuple[Change, ...] | None = None
    comparisons: tuple[dict[str, Any], ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def skipped(self) -> bool:
        """Whether something of the cell could not be looked at."""
        return any(check.status == "skipped" for check in self.checks)


class Summary(_Strict):
    """The geometric mean over cells of the time of the artifact over that of its baseline, with its own interval."""

    cells: int
    point: float
    lo: float
    hi: float


class Holm(_Strict):
    """How several latency checks were judged together."""

    hypotheses: int
    alpha: float


class GateResult(_Strict):
    """Everything that a gate found; the JSON file is this, and all other outputs are drawn from it."""

    schema_: Annotated[Literal["slimvit.gate/1"], Field(alias="schema")] = SCHEMA
    tool: str
    cells: tuple[CellResult, ...]
    accepts: tuple[AcceptUse, ...] = ()
    summary: Summary | None = None
    holm: Holm | None = None

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, populate_by_name=True)

    @property
    def checks(self) -> tuple[tuple[CellResult, Check], ...]:
        """Every check beside its cell."""
        return tuple((cell, check) for cell in self.cells for check in cell.checks)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def counts(self) -> dict[str, int]:
        """Status → number of checks, those that occur."""
        return dict(sorted(Counter(check.status for _, check in self.checks).items()))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def skipped_cells(self) -> int:
        """How many cells were skipped, wholly or in part."""
        return sum(cell.skipped for cell in self.cells)

    @property
    def evaluated_nothing(self) -> bool:
        """Whether every check was skipped."""
        return all(check.status == "skipped" for _, check in self.checks)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> GateVerdict:
        """A failure wins over doubt; a gate that evaluated nothing has failed."""
        statuses = {check.status for _, check in self.checks}
        if "fail" in statuses or self.evaluated_nothing:
            return "fail"
        return "inconclusive" if statuses & {"inconclusive", "invalid"} else "pass"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exit_code(self) -> int:
        """0, 1 or 4."""
        return EXIT_CODES[self.verdict]

    @property
    def headline(self) -> str:
        """One line: the verdict and the counts."""
        if self.evaluated_nothing:
            return f"fail: nothing was evaluated; all {len(self.checks)} checks were skipped"
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        skipped = f"; {self.skipped_cells} of {len(self.cells)} cells skipped" if self.skipped_cells else ""
        return f"{self.verdict}: {len(self.checks)} checks in {len(self.cells)} cells ({counts}{skipped})"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `gate --json`."""
        return self.model_dump(mode="json", by_alias=True)

    @staticmethod
    def load(path: Path) -> GateResult:
        """The result in a file, as far as it can be recomputed without the artifacts.

        Raises:
            StorageError: the file cannot be read.
            ArtifactError: it is none of this schema; the verdict does not follow from the checks, a size not from the
                artifact's facts, or a latency not from the raw samples.
        """
        stored = read_json(path)
        try:
            found = GateResult.model_validate_json(json.dumps(stored))
        except ValidationError as error:
            raise ArtifactError(f"{path} is no gate result of schema {SCHEMA!r}: {explain(error)}") from None
        recomputed = found.to_dict()
        for key in ("counts", "skipped_cells", "verdict", "exit_code"):
            _require_equal(path, key, stored.get(key), recomputed[key])
        for cell in found.cells:
            _require_follows(path, cell)
        return found


def _require_follows(path: Path, cell: CellResult) -> None:
    comparisons = [Comparison.recomputed(each, f"{path}, cell {cell.name!r}") for each in cell.comparisons]
    for found in comparisons:
        where = f"the comparison in cell {cell.name!r}"
        _require_equal(path, f"B of {where}", found.artifacts["B"], cell.artifact)
        _require_equal(path, f"A of {where}", found.artifacts["A"], cell.baseline or cell.artifact)
        workload = (found.scenario.batch, found.scenario.threads)
        _require_equal(path, f"batch and threads of {where}", workload, (cell.batch, cell.threads))
    for check in cell.checks:
        what = f"{check.name} of cell {cell.name!r}"
        if check.name.endswith(".size"):
            _require_equal(path, what, check.value, cell.artifact.size_bytes)
        if check.value is None or check.limit is None:
            if check.status in ("pass", "accepted"):
                raise ArtifactError(f"{path} says {check.status} of {what}, without a value or a limit; it was altered")
        elif check.name in (RATIO, TIME):
            if not comparisons:
                raise ArtifactError(f"{path} holds no samples for {what}")
            _require_latency(path, what, check, comparisons)
        else:
            held = check.value >= check.limit if check.unit == "cosine" else check.value <= check.limit
            if check.status == "pass" and not held:
                raise ArtifactError(f"{path} says pass of {what}, {check.value} against {check.limit}; it was altered")


def _require_latency(path: Path, what: str, check: Check, comparisons: list[Comparison]) -> None:
    """What is said of a latency follows from its first measurement; a failure also from the second."""
    assert check.limit is not None
    interval = estimate_of(check.name, comparisons[0]).to_ratio()
    for key, value in (("point", check.value), ("lo", check.lo), ("hi", check.hi)):
        _require_equal(path, f"{key} of {what}", value, interval[key])
    judgements = [judgement_of(check.name, each, float(check.limit), None) for each in comparisons]
    allowed: dict[str, tuple[str, ...]] = {
        "pass": ("pass",),
        "invalid": ("invalid",),
        "inconclusive": ("inconclusive", "accepted"),
        "regressed": ("fail", "inconclusive", "accepted"),  # Holm, and a second measurement, leave doubt
    }
    if check.status not in allowed[judgements[0]] or (check.status == "fail" and judgements[-1] != "regressed"):
        raise ArtifactError(f"{path} says {check.status} of {what}, its samples say {judgements}; it was altered")


def _require_equal(path: Path, what: str, said: Any, follows: Any) -> None:
    close = isinstance(said, float) and isinstance(follows, float) and math.isclose(said, follows, rel_tol=1e-9)
    if not close and said != follows:
        raise ArtifactError(f"{path} says {what} is {said!r}, but what it holds gives {follows!r}; it was altered")
