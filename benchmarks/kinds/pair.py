"""Two files timed side by side by the paired protocol: rows of a suite, or shapes of a timm model. On a quiet machine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import predict
from pydantic import Field
from records import Record, versions
from shapes import DENSE, Shape

from kinds import KINDS
from kinds.base import Cell, Kind, NotReady, Outcome, Table
from kinds.compression import Compression, CompressionCell
from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.onnx_graph import export_onnx
from toolchain.files import digest_of
from toolchain.measure.comparison import Comparison
from toolchain.measure.experiment import require_target
from toolchain.measure.samples import BLOCKS, Design, Workload
from toolchain.pipeline.job import prepare
from toolchain.progress import SILENT, Progress
from toolchain.version import tool

if TYPE_CHECKING:
    from engine import Bench
    from suite import File, Suite

LONG_MACS = 9e9
"""From here on a call of the dense model takes so long (about 0.2 s) that half of the blocks take longer than all do
elsewhere."""


class Group(Table):
    """Pairs in the same circumstances; the cells are the product.

    Attributes:
        pairs: (baseline, what is compared with it): rows of the suite, or where a model is named "FORM PRECISION".
        model: names of the suite's models; "" for rows of the suite.
        target, batch, threads: where, and how.
        looks: how often the data may be judged while it grows.
    """

    pairs: tuple[tuple[str, str], ...] = Field(min_length=1)
    model: tuple[str, ...] = ("",)
    target: tuple[str, ...] = ("ort-cpu",)
    batch: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    looks: int = 3


@dataclass(frozen=True)
class PairCell(Cell):
    """One comparison: `b` against `a`; of a timm model's shapes if `model` is named, else of rows."""

    model: str = ""
    a: str = ""
    b: str = ""
    target: str = "ort-cpu"
    batch: int = 1
    threads: int = 1
    looks: int = 3
    macs: float = 0.0

    @property
    def blocks(self) -> int:
        """Of each session."""
        return BLOCKS // 2 if self.macs >= LONG_MACS and "cpu" in self.target else BLOCKS


class Pair(Kind[PairCell, Group]):
    """A paired comparison with its raw samples."""

    name = "pair"
    group = Group
    design: tuple[str, ...] = ("target", "batch", "threads", "looks", "blocks")
    """What of a cell says how it is timed."""

    def cells(self, group: Group, file: File, path: Path) -> list[PairCell]:
        """The product of models, targets, batches, threads and pairs."""
        if unknown := [name for name in group.model if name and name not in file.models]:
            raise RecipeError(f"{path} times {unknown[0]!r}, which is no model; known: {', '.join(file.models)}")
        product = itertools.product(group.model, group.target, group.batch, group.threads, group.pairs)
        cells = []
        for model, target, batch, threads, (a, b) in product:
            name, macs = f"{a}--{b}", 0.0
            if model:
                parts = "--".join(each.replace(" ", "-") for each in (a, b))
                name = f"{model}.{parts}.{target}.b{batch}.t{threads}"
                macs = file.models[model].macs * batch
            own = (model, a, b, target, batch, threads, group.looks, macs)
            cells.append(PairCell(name, self.name, "", "", 0.0, *own))
        return cells

    def check(self, cell: PairCell, suite: Suite) -> None:
        """Both sides must be there: a form of the suite, or a row that starts from a dense model and is not trained."""
        for side in (cell.a, cell.b):
            if cell.model:
                shape(cell.model, side, suite.file, suite.path)
            else:
                self._row(side, suite)

    def _row(self, row: str, suite: Suite) -> CompressionCell:
        """The cell of a row that is timed: without training, which changes no shape, and with the first seed."""
        for each in suite.cells:
            if isinstance(each, CompressionCell) and each.row == row and each.reference and each.training == "zero":
                return each
        raise RecipeError(f"{suite.path} times {row!r}, which has no cell without training from a dense model")

    def waits_for(self, cell: PairCell, suite: Suite) -> Sequence[Cell]:
        """The rows that are timed."""
        return () if cell.model else [self._row(row, suite) for row in (cell.a, cell.b)]

    def unavailable(self, cell: PairCell) -> str:
        """Why its target cannot time anything here."""
        try:
            require_target(cell.target, ())
        except (TargetUnavailable, RecipeError) as error:  # a recorded cell may be of a mode that is no more
            return str(error)
        return ""

    def key(self, cell: PairCell, bench: Bench, record: Record | None = None) -> str:
        """Digest of what the two files are made from, and where they are timed; neither weights and versions nor for how long."""
        return digest_of(f"benchmark {self.name}", self._sides(cell, bench), [cell.target, cell.batch, cell.threads])

    def design_of(self, cell: PairCell) -> dict[str, Any]:
        """How a cell is timed."""
        return {name: getattr(cell, name) for name in self.design}

    def how(self, cell: PairCell, design: Design) -> tuple[str, Workload, Design]:
        """Target, workload and design of a cell; the design's own numbers hold where a cell has no others."""
        given = {name: value for name, value in self.design_of(cell).items() if name in Design.model_fields}
        return cell.target, Workload(cell.batch, cell.threads), design.model_copy(update=given)

    def _sides(self, cell: PairCell, bench: Bench) -> list[Any]:
        file, sides = bench.suite.file, []
        for side in (cell.a, cell.b):
            if cell.model:
                one = shape(cell.model, side, file, bench.suite.path)
                sides.append([one.timm_name, one.sections, one.precision])
                continue
            row = self._row(side, bench.suite)
            if (record := bench.record(row)) is None:
                raise NotReady(f"{cell.name} waits for {row.name}")
            sides.append(record.key)
        return sides

    def files(self, cell: PairCell, bench: Bench) -> list[Path]:
        """The two files, made where they are not there."""
        if cell.model:
            sides = (shape(cell.model, side, bench.suite.file, bench.suite.path) for side in (cell.a, cell.b))
            return [side.file(bench.work / "shapes") for side in sides]
        return [exported(self._row(side, bench.suite), bench) for side in (cell.a, cell.b)]

    def is_current(self, cell: PairCell, record: Record, bench: Bench) -> bool:
        """Whether its statistics follow from its samples, they are valid, and it is of the files as they are made now.

        Bytes are counted and not compared: compressed weights differ in their last bits from processor to processor,
        and latency does not depend on them.
        """
        try:
            comparison = comparison_of(record)
        except (ArtifactError, StorageError):
            return False
        return comparison.verdict != "invalid" and same_sizes(comparison.artifacts, self.files(cell, bench))

    def predict(self, todo: Sequence[PairCell], bench: Bench, rate: float) -> dict[str, float]:
        """From the MACs of the dense model."""
        return {cell.name: predict.comparison_seconds(cell.macs / (rate * cell.threads), cell.blocks) for cell in todo}

    def measure(self, cell: PairCell, bench: Bench, progress: Progress) -> Outcome:
        """Times the two files."""
        comparison = bench.harness.compare(*self.files(cell, bench), *self.how(cell, Design()), progress=progress)
        return outcome_of(comparison, self.definition_of(cell))

    def definition_of(self, cell: PairCell) -> dict[str, Any]:
        """What is timed, and how."""
        return {"model": cell.model, "a": cell.a, "b": cell.b, **self.design_of(cell)}

    def summary(self, record: Record) -> str:
        """The verdict and the speedup."""
        return f"{record.result['verdict']}, {1 / record.result['ratio']['point']:.2f}×"


def outcome_of(comparison: Comparison, definition: dict[str, Any]) -> Outcome:
    """A comparison as what is recorded of it."""
    return Outcome(definition, comparison.to_dict(), comparison.environment, versions())


def comparison_of(record: Record) -> Comparison:
    """The comparison of a record, recomputed from its samples; raises ArtifactError if its statistics do not follow."""
    return Comparison.recomputed(record.result, f"{record.suite}/{record.cell}")


def same_sizes(artifacts: Any, files: Sequence[Path]) -> bool:
    """Whether files have as many bytes as those that were timed."""
    return [open_artifact(file).size_bytes for file in files] == [artifacts[name].size_bytes for name in ("A", "B")]


def shape(model: str, side: str, file: File, path: Path) -> Shape:
    """The file of one side, "FORM PRECISION"; a form that is the name of a model is that model as it is."""
    form, _, precision = side.partition(" ")
    if form in file.models:
        model, form = form, DENSE
    if form != DENSE and form not in file.forms:
        raise RecipeError(f"{path} times {side!r}, which is no form; known: {', '.join((DENSE, *file.forms))}")
    return Shape(model, file.models[model].name, form, file.forms.get(form, {}), precision)


def exported(cell: CompressionCell, bench: Bench) -> Path:
    """An ONNX file of a row, as slimvit exports it: one opset and one exporter for every method and peer."""
    kind = KINDS[cell.kind]
    assert isinstance(kind, Compression)
    chosen, key = kind.chosen(cell, bench), kind.key(cell, bench)
    path = bench.work / "onnx" / key[:16] / f"{cell.row}.onnx"
    if not path.exists():
        ready = bench.reference(cell.reference, cell.seed)
        job = prepare(kind.recipe(cell, bench.suite, chosen, str(ready.weights)))
        masked, *_ = kind.compressed(job, kind.other_settings(cell, chosen), ready, bench.work, SILENT)
        module, _ = kind.final(job, masked)
        export_onnx(
            module,
            path,
            input_size=masked.preprocess.input_size,
            opset=job.recipe.export.opset,
            metadata={"slimvit.tool": tool(), "benchmark": cell.row},
            simplify=True,
        )
    return path


KIND = Pair()
