"""Latency of the pairs that a suite names, by the paired protocol; on a quiet machine, apart from the cells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cells

from toolchain.bench.compare import compare
from toolchain.export.onnx_graph import export_onnx
from toolchain.job import prepare, tool

if TYPE_CHECKING:
    from run import Runner

TARGET = "ort-cpu"


def measure_pairs(runner: Runner) -> int:
    """0 after every pair was timed and its raw samples were recorded, 1 if the suite names none.

    Every row is timed without recovery, with its first seed: training changes no shape.
    """
    suite = runner.suite
    if not suite.latency:
        print(f'error: {suite.name} names no pairs to time; add latency = [["a", "b"]]', file=sys.stderr)
        return 1
    for first, second in suite.latency:
        files = [exported(runner, row) for row in (first, second)]
        told = lambda text, share: print(f"  {share:4.0%} {text}", flush=True)  # noqa: E731
        found = compare(files[0], files[1], target=TARGET, on_progress=told)
        path = runner.results.root / suite.name / "latency" / f"{first}--{second}.json"
        found.save(path)
        print(f"{first} → {second}: {found.verdict}")
    return 0


def exported(runner: Runner, row: str) -> Path:
    """An ONNX file of a row, as slimvit exports it: one opset and one exporter for every method and peer."""
    cell = next(each for each in runner.suite.cells if each.row == row and each.training == "zero")
    ask = runner.ask(cell)
    assert ask.reference is not None
    path = runner.work / "onnx" / ask.key[:16] / f"{row}.onnx"
    if not path.exists():
        job = prepare(ask.recipe)
        masked, _ = cells.compressed(job, ask.peer, ask.reference, runner.work, print)
        module, _ = cells.final(job, masked, ask.peer)
        export_onnx(
            module,
            path,
            input_size=masked.preprocess.input_size,
            opset=ask.recipe.export.opset,
            metadata={"slimvit.tool": tool(), "benchmark": row},
            simplify=True,
        )
    return path
