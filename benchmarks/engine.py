"""Carries out a suite: what is recorded of its cells, what is to do, and measuring that, beside other processes."""

from __future__ import annotations

import fnmatch
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import references
from filelock import FileLock, Timeout
from kinds import KINDS
from kinds.base import Cell, Kind, NotReady, Outcome
from predict import matmul_rate
from records import Record, Results, same, today
from suite import Suite

from toolchain.analysis.floor import measure_floor
from toolchain.measure.compare import compare
from toolchain.pipeline.run import run
from toolchain.progress import Nobody, Progress

WAIT_S = 5.0


class Percents(Nobody):
    """Prints each new percent of what has a name."""

    def __init__(self, name: str) -> None:
        self._name, self._last = name, -1

    def at(self, share: float, text: str) -> None:
        """Says a share that is another percent than the last one was."""
        if int(100 * share) != self._last:
            self._last = int(100 * share)
            print(f"  {self._name}: {share:4.0%} {text}", flush=True)


def said(name: str) -> Progress:
    """Progress that is printed, percent by percent."""
    return Progress(Percents(name))


@dataclass(frozen=True)
class Harness:
    """What measures: slimvit's own functions, or the same with less to do."""

    compare: Callable[..., Any] = compare
    floor: Callable[..., Any] = measure_floor
    run: Callable[..., Any] = run
    rate: Callable[[], float] = matmul_rate
    wait: Callable[[float], None] = time.sleep


@dataclass
class Bench:
    """A suite, what is recorded of it, and the folder that it works in."""

    suite: Suite
    results: Results
    work: Path
    harness: Harness = field(default_factory=Harness)

    def __post_init__(self) -> None:
        self._references: dict[tuple[str, int], references.Ready] = {}

    def kind(self, cell: Cell) -> Kind[Any, Any]:
        """The kind of a cell."""
        return KINDS[cell.kind]

    def record(self, cell: Cell) -> Record | None:
        """The record of a cell, if it was measured from what the cell is now."""
        record = self.results.read(self.suite.name, cell.name)
        if record is None or record.kind != cell.kind:
            return None
        try:
            return record if record.key == self.kind(cell).key(cell, self, record) else None
        except NotReady:
            return None

    def is_done(self, cell: Cell) -> bool:
        """Whether a cell need not be measured; files may be made to find out."""
        record = self.record(cell)
        return record is not None and self.kind(cell).is_current(cell, record, self)

    def require_ready(self, cell: Cell) -> None:
        """Raises NotReady while a record that a cell waits for is missing or out of date."""
        for other in self.kind(cell).waits_for(cell, self.suite):
            if self.record(other) is None:
                raise NotReady(f"{cell.name} waits for {other.name}")

    def measure(self, cell: Cell) -> Record:
        """The record of a cell, measured now unless the same was measured under another name."""
        kind, suite = self.kind(cell), self.suite.name
        key = kind.key(cell, self)
        twin = self.results.with_key(cell.kind, key) if kind.shared else None
        if twin is not None and (twin.suite, twin.cell) != (suite, cell.name):
            return self.results.save(same(twin, suite, cell, kind.definition(cell, twin.definition)))
        outcome = kind.measure(cell, self, said(cell.name))
        for (name, beside), other in outcome.beside.items():
            self.results.save(self._made(f"{cell.name}.{name}", beside, key, other))
        return self.results.save(self._made(cell.name, cell.kind, key, outcome))

    def _made(self, name: str, kind: str, key: str, outcome: Outcome) -> Record:
        facts = (outcome.definition, outcome.result, outcome.machine, today(), outcome.versions)
        seconds = {phase: round(value, 2) for phase, value in outcome.seconds.items()}
        return Record(self.suite.name, name, kind, key, *facts, seconds)

    def ready(self, reference: str, seed: int) -> references.Ready | None:
        """A dense model of the suite, if it is on this machine."""
        at = (reference, seed)
        if at not in self._references and (ready := references.find(self.suite, *at, self.work)) is not None:
            self._references[at] = ready
        return self._references.get(at)

    def reference(self, reference: str, seed: int) -> references.Ready:
        """A dense model of the suite, trained now if it is not there."""
        if (ready := self.ready(reference, seed)) is None:
            ready = references.get(self.suite, reference, seed, self.work, said(f"{reference}_s{seed}"))
            self._references[reference, seed] = ready
        return ready

    def predicted_seconds(self, todo: list[Cell], rate: float) -> dict[str, float]:
        """Name → seconds, of the cells to do and of the dense models that they need."""
        seconds: dict[str, float] = {}
        for name in dict.fromkeys(cell.kind for cell in todo):
            seconds |= KINDS[name].predict([cell for cell in todo if cell.kind == name], self, rate)
        return seconds


def picked(suite: Suite, pattern: str) -> list[Cell]:
    """The cells whose name matches, and those that they wait for."""
    wanted = {cell.name for cell in suite.cells if fnmatch.fnmatch(cell.name, pattern)}
    grown = True
    while grown:
        more = {o.name for c in suite.cells if c.name in wanted for o in KINDS[c.kind].waits_for(c, suite)} - wanted
        wanted, grown = wanted | more, bool(more)
    return [cell for cell in suite.cells if cell.name in wanted]


def work_through(bench: Bench, wanted: list[Cell]) -> list[str]:
    """Names of the cells that failed, after all others were measured, here or by processes beside this one."""
    failed: list[str] = []
    todo = list(wanted)
    while todo:
        progress = busy = False
        for cell in list(todo):
            try:
                bench.require_ready(cell)
            except NotReady:
                continue
            path = bench.work / "locks" / f"{bench.suite.name}.{cell.name}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(path, blocking=False):
                    todo.remove(cell)
                    progress = True
                    failed += [] if bench.is_done(cell) or _measured(bench, cell) else [cell.name]
            except Timeout:
                busy = True
        if not progress and not busy:
            for cell in todo:
                print(f"FAILED {cell.name}: what it waits for is not recorded", file=sys.stderr, flush=True)
            return [*failed, *(cell.name for cell in todo)]
        if not progress:
            bench.harness.wait(WAIT_S)
    return failed


def _measured(bench: Bench, cell: Cell) -> bool:
    start = time.monotonic()
    try:
        record = bench.measure(cell)
    except Exception:  # noqa: BLE001 - the other cells are still worth measuring; the exit code tells
        print(f"FAILED {cell.name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return False
    print(f"done {cell.name}: {bench.kind(cell).summary(record)}, {time.monotonic() - start:.0f} s", flush=True)
    return True
