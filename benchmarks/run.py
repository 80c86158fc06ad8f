"""Measures the cells of a suite that are not recorded yet: `python benchmarks/run.py benchmarks/suites/paper.toml`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import cells
import latency
import peers
import predict
import references
import torch
from records import Record, Results, best_try, cell_key, described
from suite import Cell, Suite

from toolchain.errors import RecipeError, SlimvitError
from toolchain.pipeline.job import prepare
from toolchain.recipe import FinetuneSection, Recipe

HERE = Path(__file__).resolve().parent
WAIT_S = 5.0


class NotReady(SlimvitError):
    """A cell depends on a sweep or a reference that is not there yet."""


@dataclass(frozen=True)
class Ask:
    """A cell with all that is needed to measure it, and the key that its record must have."""

    recipe: Recipe
    peer: Mapping[str, Any]
    reference: references.Ready | None
    key: str


class Runner:
    """A suite, what is recorded of it, and the folder that it works in."""

    def __init__(self, suite: Suite, results: Results, work: Path) -> None:
        self.suite, self.results, self.work = suite, results, work
        self._references: dict[tuple[str, int], references.Ready] = {}
        self._sizes: dict[str, predict.Sizes] = {}

    def ask(self, cell: Cell) -> Ask:
        """What it takes to measure a cell; its reference is trained now if it is not there.

        Raises:
            NotReady: a sweep that it relies on is incomplete.
        """
        chosen = self.chosen(cell)
        reference = self._reference(cell) if cell.reference else None
        checkpoint = str(reference.weights) if reference else ""
        recipe, peer = self.suite.recipe(cell, chosen, checkpoint), self.suite.peer(cell, chosen)
        return Ask(recipe, peer, reference, self._key(recipe, peer, reference.weights_sha256 if reference else ""))

    def _key(self, recipe: Recipe, peer: Mapping[str, Any], weights_sha256: str) -> str:
        return cell_key(
            recipe, peer, weights_sha256, {**(peers.peer_version() if peer else {}), "kind": self.suite.kind}
        )

    def chosen(self, cell: Cell) -> dict[str, Any]:
        """What the sweeps gave that a cell relies on; raises NotReady while a try is missing or out of date."""
        values: dict[str, Any] = {}
        for sweep in cell.best:
            tries = [self.record(each) for each in self.suite.sweeps[sweep]]
            if None in tries:
                raise NotReady(f"{cell.name} waits for the sweep {sweep!r}")
            values |= best_try([record for record in tries if record is not None]).tried
        return values

    def record(self, cell: Cell) -> Record | None:
        """The record of a cell, if it was measured from what the cell is now.

        Where the reference is not on this machine, it is the one that the record names: training is not the same to the
        bit on every processor, and a record does not lapse because its weights lie elsewhere.
        """
        record = self.results.read(self.suite.name, cell.name)
        if record is None:
            return None
        try:
            chosen = self.chosen(cell)
        except NotReady:
            return None
        here = self._found(cell) if cell.reference else None
        weights = here.weights_sha256 if here else record.get("weights_sha256", "")
        recipe = self.suite.recipe(cell, chosen, "elsewhere" if cell.reference else "")
        return record if record["key"] == self._key(recipe, self.suite.peer(cell, chosen), weights) else None

    def _found(self, cell: Cell) -> references.Ready | None:
        at = (cell.reference, cell.seed)
        if at not in self._references and (found := references.find(self.suite, *at, self.work)) is not None:
            self._references[at] = found
        return self._references.get(at)

    def _reference(self, cell: Cell) -> references.Ready:
        if (found := self._found(cell)) is None:
            told = cells.steps(lambda text: print(f"  {cell.model}: {text}", flush=True))
            found = references.get(self.suite, cell.reference, cell.seed, self.work, told)
            self._references[cell.reference, cell.seed] = found
        return found

    def measure(self, cell: Cell) -> Record:
        """The record of a cell, measured now unless the same was measured under another name."""
        ask = self.ask(cell)
        same = self.results.with_key(ask.key)
        if same is not None:
            return self.results.save(self.suite, cell, ask.key, {**same, "same_as": f"{same['suite']}/{same['cell']}"})
        told = lambda text: print(f"  {cell.name}: {text}", flush=True)  # noqa: E731
        if self.suite.kind == "scale":
            outcome = in_fresh_process(ask.recipe)
        else:
            assert ask.reference is not None
            outcome = cells.measure(cell, ask.recipe, ask.peer, ask.reference, self.work, ask.key, told)
        return self.results.save(self.suite, cell, ask.key, outcome)

    def predicted_seconds(self, todo: list[Cell], rate: float) -> dict[str, float]:
        """Name → seconds, of the cells to do and of the references that they need."""
        known = predict.recorded_seconds(self.results.of(self.suite))
        found: dict[str, float] = {}
        begun: set[str] = set()
        for cell in todo:
            try:
                chosen = self.chosen(cell)
            except NotReady:
                chosen = {}
            recipe, sizes = self.suite.recipe(cell, chosen), self.sizes(cell)
            kind = predict.kind(described(recipe), self.suite.peer(cell, chosen), cell.training)
            start = json.dumps([cell.model, described(recipe.model_copy(update={"finetune": FinetuneSection()}))])
            shared = start in begun and self.suite.kind != "scale"
            begun.add(start)
            found[cell.name] = known.get(kind) or predict.cell_seconds(recipe, sizes, rate, compressed=shared)
            if cell.reference and references.find(self.suite, cell.reference, cell.seed, self.work) is None:
                found[cell.model] = predict.training_seconds(
                    self.suite.reference_recipe(cell.reference, cell.seed), sizes, rate
                )
        return found

    def sizes(self, cell: Cell) -> predict.Sizes:
        """What a pass over the data costs for a cell."""
        recipe = self.suite.reference_recipe(cell.reference, cell.seed) if cell.reference else self.suite.recipe(cell)
        name = cell.reference or json.dumps(recipe.model.model_dump(mode="json"))
        if name not in self._sizes:
            self._sizes[name] = predict.Sizes.of(prepare(recipe))
        return self._sizes[name]


def in_fresh_process(recipe: Recipe) -> dict[str, Any]:
    """What scale.py measures of a recipe; raises RuntimeError with its last lines if it fails."""
    command = [sys.executable, str(HERE / "scale.py"), json.dumps(recipe.model_dump(mode="json"))]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(f"scale.py ended with {done.returncode}:\n{done.stderr[-2000:]}")
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"definition": {"recipe": described(recipe), "peer": {}}, **outcome}


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether this process is the only one in the block; the lock ends with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def work_through(runner: Runner, todo: list[Cell]) -> list[str]:
    """Names of the cells that failed, after all others were measured, here or by processes beside this one."""
    failed: list[str] = []
    while todo:
        progress = busy = False
        for cell in list(todo):
            try:
                runner.chosen(cell)
            except NotReady:
                continue
            with try_lock(runner.work / "locks" / f"{runner.suite.name}.{cell.name}.lock") as mine:
                if not mine:
                    busy = True
                    continue
                todo.remove(cell)
                progress = True
                if runner.record(cell) is not None:
                    continue
                failed += [] if _measured(runner, cell) else [cell.name]
        if not progress and not busy:
            for cell in todo:
                print(f"FAILED {cell.name}: a sweep that it waits for is not complete", file=sys.stderr, flush=True)
            return [*failed, *(cell.name for cell in todo)]
        if not progress:
            time.sleep(WAIT_S)
    return failed


def _measured(runner: Runner, cell: Cell) -> bool:
    start = time.monotonic()
    try:
        record = runner.measure(cell)
    except Exception:  # noqa: BLE001 - the other cells are still worth measuring; the exit code tells
        print(f"FAILED {cell.name}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return False
    wrong = f"{record['test']['wrong']} of {record['test']['total']} wrong, " if "test" in record else ""
    print(f"done {cell.name}: {wrong}{record['params']:,} params, {time.monotonic() - start:.0f} s", flush=True)
    return True


def picked(suite: Suite, pattern: str) -> list[Cell]:
    """The cells whose name matches, and before them the tries of the sweeps that they rely on."""
    wanted = {cell.name for cell in suite.cells if fnmatch.fnmatch(cell.name, pattern)}
    grown = True
    while grown:
        needed = {sweep for cell in suite.cells if cell.name in wanted for sweep in cell.best}
        more = {cell.name for cell in suite.cells if cell.sweep in needed} - wanted
        wanted, grown = wanted | more, bool(more)
    return [cell for cell in suite.cells if cell.name in wanted]


def main(arguments: list[str] | None = None) -> int:
    """0 if everything that was asked for is recorded, 1 if a cell failed, 2 for a mistake in the suite or command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and how long it would take")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells whose name matches, and their sweeps")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where models and checkpoints are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where cells are recorded")
    parser.add_argument("--adopt", action="append", default=[], metavar="NAME=FOLDER", help="a reference to reuse")
    parser.add_argument("--latency", action="store_true", help="time the pairs of the suite; on a quiet machine")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        return _main(options)
    except SlimvitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    suite, work = Suite.load(options.suite), options.work.resolve()
    runner = Runner(suite, Results(options.results.resolve()), work)
    for text in options.adopt:
        name, _, folder = text.partition("=")
        facts = references.adopt(suite, name, Path(folder), work).facts
        print(f"adopted {name}: {facts['test']['wrong']} of {facts['test']['total']} test images wrong")
    if options.adopt:
        return 0
    if options.latency:
        if options.dry_run or options.only != "*":
            raise RecipeError("--latency times all pairs that the suite names; leave out --only and --dry-run")
        return latency.measure_pairs(runner)
    wanted = picked(suite, options.only)
    if not wanted:
        raise RecipeError(f"{suite.name} has no cell {options.only!r}")
    todo = [cell for cell in wanted if runner.record(cell) is None]
    rate = predict.matmul_rate()
    seconds = runner.predicted_seconds(todo, rate)
    print(
        f"{suite.name}: {len(wanted) - len(todo)} of {len(wanted)} cells are recorded; the rest is predicted to take "
        f"{sum(seconds.values()) / 3600:.2f} hours ({rate / 1e9:.0f} GMAC/s, {torch.get_num_threads()} thread(s))"
    )
    for cell in wanted:
        print(f"  {'to do' if cell in todo else 'done '} {seconds.get(cell.name, 0.0):7.0f} s  {cell.name}")
    for name in dict.fromkeys(cell.model for cell in todo if cell.model in seconds):
        print(f"  train {seconds[name]:7.0f} s  {name}")
    if options.dry_run:
        return 0
    failed = work_through(runner, todo)
    if failed:
        print(f"{len(failed)} cells failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
