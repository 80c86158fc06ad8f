"""The evidence of all cells, and everything derived from it: checks, verdict, exit code.

Derived values are never stored in the object. The file shows them too, and is refused on loading if they do not follow from
the evidence in it.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from toolchain.errors import RecipeError
from toolchain.gate.accepts import Accept, AcceptState, AcceptUse, Key, last_of_each
from toolchain.gate.checks import Check, Number, Status, count_check, features_check, parity_check, unjudged_check
from toolchain.gate.config import Cell, GateConfig
from toolchain.gate.costs import cost_allowances, cost_check, fails_at_first, needs_more
from toolchain.gate.evidence import Change, Evidence
from toolchain.gate.latency import (
    Case,
    Holm,
    Judged,
    Summary,
    allowances,
    confirmed,
    judge_together,
    latency_check,
    summary_of,
    undecided_by,
    untimed_check,
)
from toolchain.gate.starts import Starts
from toolchain.gate.why import by_layer
from toolchain.measure import stored
from toolchain.measure.comparison import Comparison, Undecided
from toolchain.measure.samples import ArtifactFacts
from toolchain.records import Record

SCHEMA: Literal["slimvit.gate/2"] = "slimvit.gate/2"
GateVerdict = Literal["pass", "fail", "inconclusive"]
EXIT_CODES: Mapping[GateVerdict, int] = {"pass": 0, "fail": 1, "inconclusive": 4}


def _statistics(comparison: Comparison) -> dict[str, object]:
    """What a comparison says, without the samples that it follows from."""
    return {key: value for key, value in comparison.to_dict().items() if key not in stored.SEALED}


class CellResult(Record):
    """One cell: its checks in the order of gate.toml's keys, its size or the change of it by layer, its measurements."""

    name: str
    target: str
    batch: int
    threads: int
    artifact: ArtifactFacts
    baseline: ArtifactFacts | None
    checks: tuple[Check, ...]
    layers: tuple[Change, ...] | None
    comparisons: tuple[Annotated[Comparison, PlainSerializer(_statistics), WithJsonSchema({"type": "object"})], ...]

    @property
    def skipped(self) -> bool:
        """Whether something of the cell could not be looked at."""
        return any(check.status == "skipped" for check in self.checks)


class GateResult(Record):
    """What a gate was asked, when, what had been accepted, and what is known of every cell; the rest follows from it.

    Raises:
        ValidationError: two cells have one name.
    """

    name: ClassVar[str] = SCHEMA

    tool: str
    day: dt.date
    accepts: tuple[Accept, ...] = ()
    evidence: tuple[Evidence, ...]

    @model_validator(mode="after")
    def _has_every_cell_once(self) -> GateResult:
        if len({each.cell.name for each in self.evidence}) < len(self.evidence):
            raise ValueError("two cells have the same name")
        return self

    @cached_property
    def _accepted(self) -> dict[Key, Number]:
        """(cell, check) → the value up to which it is accepted now."""
        entries = last_of_each(self.accepts).items()
        return {key: each.at_most for key, each in entries if each.expires >= self.day and not self._moved(each)}

    def meaning(self, cell: str, check: str) -> dict[str, str | None]:
        """`Evidence.basis` and `Evidence.workload` of a cell as an accept has them; empty if there is no such cell."""
        found = next((each for each in self.evidence if each.cell.name == cell), None)
        return {} if found is None else {"against": found.basis(check), "workload": found.workload(check)}

    def _moved(self, entry: Accept) -> bool:
        """Whether a value was accepted against another baseline, of other pictures or of another workload than there are."""
        meaning = self.meaning(entry.cell, entry.check)
        return any(getattr(entry, key) not in (None, meaning.get(key)) for key in ("against", "workload"))

    def undecided(self, evidence: Evidence) -> Undecided:
        """What the comparison of a cell grows by: whether one of its checks is open."""
        return undecided_by(allowances(evidence, self._accepted))

    @cached_property
    def _cases(self) -> dict[Key, Case]:
        return {
            (each.cell.name, name): Case(name, allowance, each.comparisons[0], each.attempts[1:])
            for each in self.evidence
            if each.comparisons
            for name, allowance in allowances(each, self._accepted).items()
        }

    @cached_property
    def _at_first(self) -> tuple[dict[Key, Judged], Holm | None]:
        """What the first measurements say."""
        return judge_together(self._cases)

    @property
    def too_slow_at_first(self) -> tuple[str, ...]:
        """The cells that fail by their first measurement, which a gate confirms by a second one."""
        return tuple(dict.fromkeys(cell for (cell, _), each in self._at_first[0].items() if each.status == "fail"))

    @property
    def too_costly_at_first(self) -> tuple[str, ...]:
        """The cells whose cold starts fail a check, which a gate confirms by starts that it takes later."""
        return tuple(each.cell.name for each in self.evidence if fails_at_first(each, self._accepted))

    def needs_starts(self, evidence: Evidence) -> Callable[[Starts], bool]:
        """Whether some cold starts of a cell leave one of its checks open."""
        return partial(needs_more, allowances=cost_allowances(evidence, self._accepted))

    def require_protocol(self) -> None:
        """Raises ValueError unless every measurement was taken that decides a check, and none besides."""
        for each in self.evidence:
            for starts in each.starts:
                if isinstance(starts, Starts):
                    starts.require_looks(self.needs_starts(each))
            due = 0 if not each.to_start else 2 if fails_at_first(each, self._accepted) else 1
            if len(each.starts) != due:
                raise ValueError(
                    f"cell {each.cell.name!r} has cold starts of {len(each.starts)} times, and {due} are due"
                )
            for comparison in each.comparisons:
                comparison.require_looks(self.undecided(each))
            due = 0 if not each.to_time else 2 if each.cell.name in self.too_slow_at_first else 1
            if len(each.attempts) != due:
                raise ValueError(f"cell {each.cell.name!r} has {len(each.attempts)} measurements, and {due} are due")

    def _check(self, name: str, evidence: Evidence) -> Check:
        key = evidence.cell.name, name
        if name in evidence.unjudged:
            return unjudged_check(name, evidence)
        if key in self._cases:
            return latency_check(self._cases[key], confirmed(self._cases[key], self._at_first[0][key]))
        if name in evidence.cost_checks:
            return cost_check(name, evidence, self._accepted)
        if name in evidence.latency_checks:
            return untimed_check(name, evidence)
        if name == "relation.parity":
            return parity_check(name, evidence)
        if name == "relation.features":
            return features_check(name, evidence)
        return count_check(name, evidence, self._accepted.get(key))

    @cached_property
    def cells(self) -> tuple[CellResult, ...]:
        """Every cell with its checks."""
        return tuple(
            CellResult(
                name=each.cell.name,
                target=each.cell.target,
                batch=each.cell.batch,
                threads=each.cell.threads or 1,
                artifact=each.artifact.file,
                baseline=each.baseline.file if each.baseline else None,
                checks=tuple(self._check(name, each) for name in each.cell.checks),
                layers=None if each.changes is None else by_layer(each.changes),
                comparisons=each.comparisons,
            )
            for each in self.evidence
        )

    @property
    def checks(self) -> tuple[tuple[CellResult, Check], ...]:
        """Every check beside its cell."""
        return tuple((cell, check) for cell in self.cells for check in cell.checks)

    @property
    def accept_uses(self) -> tuple[AcceptUse, ...]:
        """What came of every entry that counts."""
        checks = {(cell.name, check.name): check for cell, check in self.checks}
        entries = last_of_each(self.accepts).items()
        return tuple(AcceptUse(**dict(each), state=self._use(each, checks.get(key))) for key, each in entries)

    def _use(self, entry: Accept, check: Check | None) -> AcceptState:
        if check is None:
            return "unknown"
        if entry.expires < self.day:
            return "expired"
        if self._moved(entry):
            return "moved"
        if check.status == "accepted":
            return "used"
        if check.status == "fail" and check.value is not None:
            return "exceeded"
        return "unused" if check.status == "pass" else "undecided"

    @property
    def summary(self) -> Summary | None:
        """The mean ratio of times over cells; nothing is judged by it."""
        return summary_of(list(self._cases.values()))

    @property
    def holm(self) -> Holm | None:
        """How the latency checks were judged together, if there are many."""
        return self._at_first[1]

    @property
    def counts(self) -> dict[Status, int]:
        """Status → number of checks, those that occur."""
        return dict(sorted(Counter(check.status for _, check in self.checks).items()))

    @property
    def skipped_cells(self) -> int:
        """How many cells were skipped, wholly or in part."""
        return sum(cell.skipped for cell in self.cells)

    @property
    def evaluated_nothing(self) -> bool:
        """Whether every check was skipped."""
        return self.counts.keys() <= {"skipped"}

    @property
    def verdict(self) -> GateVerdict:
        """A failure wins over doubt; a gate that evaluated nothing has failed."""
        if "fail" in self.counts or self.evaluated_nothing:
            return "fail"
        return "inconclusive" if self.counts.keys() & {"inconclusive", "invalid"} else "pass"

    @property
    def exit_code(self) -> int:
        """0, 1 or 4."""
        return EXIT_CODES[self.verdict]

    @property
    def headline(self) -> str:
        """One line: the verdict and the counts."""
        checks, cells = _many(len(self.checks), "check"), _many(len(self.cells), "cell")
        if self.evaluated_nothing:
            return f"fail: nothing was evaluated, {checks} skipped. Run the gate where its targets are."
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        skipped = f"; {self.skipped_cells} of {cells} skipped" if self.skipped_cells else ""
        return f"{self.verdict}: {checks} in {cells} ({counts}{skipped})"

    def require_asked(self, asked: GateConfig) -> None:
        """Raises RecipeError unless the cells of a gate were judged here as it asks for them now.

        Threads and cores that it leaves open are those of the target, and checks that it does not have play no part.
        """
        judged = {each.cell.name: each.cell for each in self.evidence}
        baselines = {each.cell.name: each.baseline and each.baseline.file.sha256 for each in self.evidence}
        for cell in asked.cell:
            if (there := judged.get(cell.name)) is None:
                raise RecipeError(f"the result has no cell {cell.name!r}; it is of another gate: judge this one")
            differing = _differences(cell, there)
            if cell.baseline and (wanted := asked.baseline[cell.baseline].sha256) and wanted != baselines[cell.name]:
                differing.append("sha256 of its baseline")
            if differing:
                raise RecipeError(
                    f"cell {cell.name!r} was judged with another {', '.join(differing)} than the gate asks for now; judge it again"
                )

    def to_dict(self) -> dict[str, object]:
        """The JSON object of `gate --json`: what follows, and under `raw` what it follows from."""
        sealed = stored.sealed(self.model_dump(mode="json", by_alias=True))
        return Shown.model_validate(self).model_dump(mode="json", by_alias=True) | sealed

    @staticmethod
    def load(path: Path) -> GateResult:
        """The result in a file; raises as `stored.load`."""
        return stored.load(path, SCHEMA, _parse)


def _parse(text: str) -> GateResult:
    result = GateResult.model_validate_json(text)
    result.require_protocol()
    return result


def _differences(cell: Cell, judged: Cell) -> list[str]:
    """The keys in which a cell of a gate differs from the cell that was judged, whose artifact is a name alone."""
    artifact = Path(cell.artifact).name
    keys = {"artifact": artifact == judged.artifact} | {
        key: getattr(cell, key) == getattr(judged, key) for key in ("baseline", "target", "batch", "input_shape")
    }
    keys |= {key: getattr(cell, key) in (None, getattr(judged, key)) for key in ("threads", "affinity")}
    for kind in ("budget", "relation"):
        asked, had = getattr(cell, kind), getattr(judged, kind)
        keys |= {
            f"{kind}.{name}": bound in (None, getattr(had, name))
            for name, bound in ((name, getattr(asked, name)) for name in type(asked).model_fields)
        }
    return [key for key, same in keys.items() if not same]


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


class Shown(BaseModel):
    """What the JSON file says of a result, before `raw`."""

    model_config = ConfigDict(from_attributes=True)

    schema_: Literal["slimvit.gate/2"] = Field(SCHEMA, serialization_alias="schema")
    tool: str
    day: dt.date
    verdict: GateVerdict
    exit_code: int
    headline: str
    counts: dict[Status, int]
    skipped_cells: int
    summary: Summary | None
    holm: Holm | None
    accept_uses: tuple[AcceptUse, ...]
    cells: tuple[CellResult, ...]


class GateFile(Shown):
    """The JSON object of `gate --json`: all but `raw` follows from it."""

    raw_sha256: str
    raw: GateResult
