"""Measures the cells of a suite that are not recorded yet: `python benchmarks/run.py paper`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import ending
import references
import torch
from engine import Bench, Harness, picked, work_through
from kinds import KINDS
from records import Results
from suite import Suite

from toolchain.errors import RecipeError, SlimvitError

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None, harness: Harness | None = None) -> int:
    """0 if everything that was asked for is recorded, 1 if a cell failed, 2 for a mistake in the suite or command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path, help="a name in suites/, or a TOML file")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and how long it would take")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="cells whose name matches, and what they wait for"
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="where models and checkpoints are kept")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where cells are recorded")
    parser.add_argument("--adopt", action="append", default=[], metavar="NAME=FOLDER", help="a dense model to reuse")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        with ending.with_children():
            return _main(options, harness or Harness())
    except SlimvitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace, harness: Harness) -> int:
    suite, work = Suite.load(options.suite), options.work.resolve()
    bench = Bench(suite, Results(options.results.resolve()), work, harness)
    for text in options.adopt:
        name, _, folder = text.partition("=")
        facts = references.adopt(suite, name, Path(folder), work).facts
        print(f"adopted {name}: {facts['test']['wrong']} of {facts['test']['total']} test images wrong")
    if options.adopt:
        return 0
    wanted = picked(suite, options.only)
    if not wanted:
        raise RecipeError(f"{suite.name} has no cell {options.only!r}")
    reasons = {cell.name: KINDS[cell.kind].unavailable(cell) for cell in wanted}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        print(f"{suite.name}: {list(reasons.values()).count(reason)} cells are left out: {reason}")
    wanted = [cell for cell in wanted if not reasons[cell.name]]
    todo = [cell for cell in wanted if bench.record(cell) is None]
    rate = bench.harness.rate() if todo else 0.0
    seconds = bench.predicted_seconds(todo, rate)
    speed = f" ({rate / 1e9:.0f} GMAC/s, {torch.get_num_threads()} thread(s))" if todo else ""
    print(
        f"{suite.name}: {len(wanted) - len(todo)} of {len(wanted)} cells are recorded; the rest is predicted to take "
        f"{sum(seconds.values()) / 3600:.2f} hours{speed}"
    )
    for cell in wanted:
        print(f"  {'to do' if cell in todo else 'done '} {seconds.get(cell.name, 0.0):7.0f} s  {cell.name}")
    for name in seconds.keys() - {cell.name for cell in todo}:
        print(f"  train {seconds[name]:7.0f} s  {name}")
    if options.dry_run:
        return 0
    failed = work_through(bench, wanted)
    if failed:
        print(f"{len(failed)} cells failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
