"""Latency of the pairs that a suite names, by the paired protocol; on a quiet machine, apart from the cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cells

from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.export.onnx_graph import export_onnx
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.experiment import artifact_facts
from toolchain.pipeline.job import prepare, tool
from toolchain.progress import Nobody, Progress

if TYPE_CHECKING:
    from run import Runner

TARGET = "ort-cpu"


def measure_pairs(runner: Runner) -> int:
    """0 after every pair was timed and its raw samples were recorded; raises RecipeError if the suite names none.

    Pairs of which there is a valid comparison of the same two files are left as they are. Every row is timed without recovery, with its first seed: training changes no shape.
    """
    suite = runner.suite
    if not suite.latency:
        raise RecipeError(f'{suite.name} names no pairs to time; add latency = [["a", "b"]]')
    for first, second in suite.latency:
        files = [exported(runner, row) for row in (first, second)]
        path = runner.results.root / suite.name / "latency" / f"{first}--{second}.json"
        if timed(path, files):
            continue
        found = compare(files[0], files[1], TARGET, progress=Progress(Lines()))
        found.save(path)
        print(f"{first} → {second}: {found.verdict}")
    return 0


class Lines(Nobody):
    """A line for every report."""

    def at(self, share: float, text: str) -> None:
        """Prints it."""
        print(f"  {share:4.0%} {text}", flush=True)


def timed(path: Path, files: Sequence[Path]) -> bool:
    """Whether a valid comparison of exactly these files is recorded, and holds when computed from its samples again."""
    try:
        found = Comparison.load(path)
    except (ArtifactError, StorageError):
        return False
    same = [found.artifacts[name].sha256 for name in ("A", "B")] == [artifact_facts(file).sha256 for file in files]
    return same and found.verdict != "invalid"


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
