"""What a gate found: checks, cells, the verdict over all of them, and the exit code that follows."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from toolchain.errors import ArtifactError
from toolchain.files import read_json
from toolchain.gate.accepts import AcceptUse
from toolchain.gate.judgement import RATIO, TIME, Judgement, estimate_of, undecided_by
from toolchain.gate.limits import limit_of
from toolchain.gate.together import Case, Holm, Summary, confirmed, judge_together, summary_of
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import ArtifactFacts, explain

SCHEMA: Literal["slimvit.gate/1"] = "slimvit.gate/1"
Status = Literal["pass", "fail", "accepted", "inconclusive", "invalid", "skipped"]
GateVerdict = Literal["pass", "fail", "inconclusive"]
Unit = Literal["bytes", "parameters", "nodes", "wrong images", "ms", "ratio", "cosine"]
EXIT_CODES: dict[GateVerdict, int] = {"pass": 0, "fail": 1, "inconclusive": 4}
STATUS: Mapping[Judgement, Status] = {
    "pass": "pass",
    "regressed": "fail",
    "accepted": "accepted",
    "inconclusive": "inconclusive",
    "invalid": "invalid",
}
"""What a gate makes of what is said of a latency."""


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
        asked: what gate.toml asks for, from which the limit follows (`limits.limit_of`).
        baseline: of the baseline; None for a budget.
        total: images that were counted; None but for accuracy.
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
    asked: float | int | None = None
    baseline: float | int | None = None
    total: int | None = None
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
            ArtifactError: it is none of this schema; the verdict does not follow from the checks, a check not from its
                numbers and the accepts, a size not from the artifact's facts, or what is said of latency, check by
                check and of all together, not from the raw samples.
        """
        stored = read_json(path)
        try:
            found = GateResult.model_validate_json(json.dumps(stored))
        except ValidationError as error:
            raise ArtifactError(f"{path} is no gate result of schema {SCHEMA!r}: {explain(error)}") from None
        recomputed = found.to_dict()
        for key in ("counts", "skipped_cells", "verdict", "exit_code"):
            _require_equal(path, key, stored.get(key), recomputed[key])
        _require_follows(path, found)
        return found


def _require_follows(path: Path, result: GateResult) -> None:
    accepted = {(use.cell, use.check): use.at_most for use in result.accepts if use.state not in ("expired", "unknown")}
    cases, checks, seconds = list[Case](), list[Check](), dict[str, Comparison]()
    for cell in result.cells:
        limits = {check.name: (check.limit, accepted.get((cell.name, check.name))) for check in cell.checks}
        comparisons = _comparisons(path, cell, limits)
        if len(comparisons) > 1:
            seconds[cell.name] = comparisons[1]
        for check in cell.checks:
            what = f"{check.name} of cell {cell.name!r}"
            _require_limit(path, what, check, cell)
            limit, up_to = limits[check.name]
            if check.value is None or limit is None:
                if check.status in ("pass", "accepted"):
                    raise ArtifactError(
                        f"{path} says {check.status} of {what}, without a value or a limit; it was altered"
                    )
            elif check.name not in (RATIO, TIME):
                _require_exact(path, what, check, cell, up_to)
            elif comparisons:
                cases.append(Case(cell.name, check.name, float(limit), up_to, comparisons[0]))
                checks.append(check)
            else:
                raise ArtifactError(f"{path} holds no samples for {what}")
    judged, together = judge_together(cases)
    for case, check, first in zip(cases, checks, judged, strict=True):
        what = f"{check.name} of cell {case.cell!r}"
        again: Comparison | str = seconds.get(case.cell, "no second measurement")
        found = confirmed(case, first, again) if first.judgement == "regressed" else first
        interval = estimate_of(check.name, case.comparison).to_ratio()
        ours = case.comparison.latency_ms("A") if check.name == RATIO else None
        said = (check.status, check.value, check.lo, check.hi, check.p_value, check.baseline)
        follows = (STATUS[found.judgement], *(interval[k] for k in ("point", "lo", "hi")), found.p_value, ours)
        for key, left, right in zip(("status", "point", "lo", "hi", "p_value", "baseline"), said, follows, strict=True):
            _require_equal(path, f"{key} of {what}", left, right)
    _require_equal(path, "holm", result.holm, together)
    mean = summary_of(cases)
    for key in Summary.model_fields:
        _require_equal(path, f"{key} of the summary", getattr(result.summary, key, None), getattr(mean, key, None))


def _comparisons(
    path: Path, cell: CellResult, limits: Mapping[str, tuple[float | None, float | None]]
) -> list[Comparison]:
    """The measurements of a cell, recomputed, and of its artifacts."""
    bounds = {
        name: (float(limit), up_to)
        for name, (limit, up_to) in limits.items()
        if name in (RATIO, TIME) and limit is not None
    }
    found = [
        Comparison.recomputed(each, f"{path}, cell {cell.name!r}", undecided_by(bounds)) for each in cell.comparisons
    ]
    for each in found:
        where = f"the comparison in cell {cell.name!r}"
        _require_equal(path, f"B of {where}", each.artifacts["B"], cell.artifact)
        _require_equal(path, f"A of {where}", each.artifacts["A"], cell.baseline or cell.artifact)
        workload = (each.scenario.batch, each.scenario.threads)
        _require_equal(path, f"batch and threads of {where}", workload, (cell.batch, cell.threads))
    return found


def _require_limit(path: Path, what: str, check: Check, cell: CellResult) -> None:
    """A limit follows from what was asked for, and that of a relation from the baseline."""
    if check.limit is None:
        return
    if check.asked is None:
        raise ArtifactError(f"{path} does not say what was asked for {what}; it was altered, or is of an older slimvit")
    if check.name == "relation.size":
        _require_equal(path, f"the baseline of {what}", check.baseline, cell.baseline and cell.baseline.size_bytes)
    try:
        follows = limit_of(check.name, check.asked, baseline=check.baseline, total=check.total)
    except ValueError as error:
        raise ArtifactError(f"{path}, {what}: {error}; it was altered") from None
    _require_equal(path, f"the limit of {what}", check.limit, follows)


def _require_exact(path: Path, what: str, check: Check, cell: CellResult, accepted: float | None) -> None:
    """The status of a check without a clock follows from its numbers; of parity they are not all there."""
    assert check.value is not None
    assert check.limit is not None
    if check.name.endswith(".size"):
        _require_equal(path, what, check.value, cell.artifact.size_bytes)
    if check.unit == "cosine":
        follows = "pass" if check.status == "pass" and check.value >= check.limit else "fail"
    elif check.value <= check.limit:
        follows = "pass"
    else:
        follows = "accepted" if accepted is not None and check.value <= accepted else "fail"
    _require_equal(path, f"the status of {what}", check.status, follows)


def _require_equal(path: Path, what: str, said: Any, follows: Any) -> None:
    close = isinstance(said, float) and isinstance(follows, float) and math.isclose(said, follows, rel_tol=1e-9)
    if not close and said != follows:
        raise ArtifactError(f"{path} says {what} is {said!r}, but what it holds gives {follows!r}; it was altered")
