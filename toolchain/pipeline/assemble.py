"""Builds the report of a run from the records of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.compress.outcome import SizeBudget
from toolchain.outputs import FEATURES, WORDS, Output
from toolchain.parity import Rung
from toolchain.pipeline.folder import Done, Nothing
from toolchain.pipeline.job import Job
from toolchain.pipeline.stages.compress import CompressFacts
from toolchain.pipeline.stages.deploy import DeployFacts
from toolchain.pipeline.stages.export import FileFacts
from toolchain.pipeline.stages.finetune import TunedFacts
from toolchain.report.choice import int8_choices, suggestion
from toolchain.report.files import listing
from toolchain.report.record import (
    BenchRow,
    Counts,
    Data,
    EngineFacts,
    EngineRow,
    Figures,
    FileRow,
    LayerRow,
    ModelName,
    NotMeasured,
    Report,
    Shares,
    StageRow,
)
from toolchain.report.tables import size
from toolchain.targets import get_target, is_target
from toolchain.version import tool


@dataclass(frozen=True)
class Outcome:
    """Every stage of a run.

    Attributes:
        dense, compress, finetune, deploy: forms of the model; None where there was no fine-tuning.
        weigh: what widths do to the outputs, before one was chosen; None where that was not asked.
        files: ONNX files: of the dense model, of the compressed one, and its other precisions.
        engines: in the order of the recipe.
        cells, duels: comparisons with the dense file, and of int8 with int8; None for one that could not be made.
        not_measured: what has no latency, and why.
    """

    dense: Done[Figures]
    weigh: Done[Nothing] | None
    compress: Done[CompressFacts]
    finetune: Done[TunedFacts] | None
    deploy: Done[DeployFacts]
    files: Sequence[Done[FileFacts]]
    engines: Sequence[Done[EngineFacts]]
    cells: Sequence[Done[BenchRow] | None]
    duels: Sequence[Done[BenchRow] | None]
    not_measured: tuple[NotMeasured, ...]


def assemble(job: Job, outcome: Outcome, rungs: Sequence[Rung], files: Sequence[Path], root: Path) -> Report:
    """The report of a run.

    Args:
        job: the recipe that was carried out.
        outcome: its stages.
        rungs: of all stages, in order.
        files: everything that the stages wrote, below `root`.
        root: the run's folder.
    """
    recipe, source, weights = job.recipe, job.source, job.dense.provenance
    rows = [done.facts.row for done in outcome.files]
    dense = _shipped(outcome.dense.facts, outcome.files[0].facts)
    compressed = _shipped(outcome.deploy.facts.deploy, outcome.files[1].facts)
    increase, reason = relative_error_increase(dense, compressed, job.dense.output)
    cells, duels = ([done.facts for done in each if done is not None] for each in (outcome.cells, outcome.duels))
    int8 = int8_choices(duels, cells)
    engines = tuple(_engine(done) for done in outcome.engines)
    facts = outcome.compress.facts
    return Report(
        tool=tool(),
        synthetic=source.synthetic,
        model=ModelName(
            name=job.dense.ref.name,
            kwargs=job.dense.ref.model_dump(mode="json")["kwargs"],
            checkpoint_sha256=weights.get("checkpoint_sha256"),
        ),
        output=job.dense.output,
        data=Data(
            **source.identity,
            content=source.content,
            pictures={name: source.pictures(name) for name in source.splits} if source.content else {},
        ),
        method=job.problem.method.section,
        requested_method=recipe.compress.method,
        budget=recipe.budget,
        latency_budget=facts.latency,
        size_budget=_sizes(facts, rows),
        recipe_digest=recipe.digest,
        stages=_stages(outcome),
        dense=dense,
        compressed=compressed,
        ratio=Shares(
            params=compressed.params / dense.params,
            macs=compressed.macs / dense.macs,
            bytes=compressed.bytes / dense.bytes,
        ),
        relative_error_increase=increase,
        relative_error_increase_reason=reason,
        finetune=outcome.finetune.facts.finetune if outcome.finetune else None,
        pruned_shares=facts.pruned_shares,
        damage=facts.damage,
        front=facts.front,
        closed_form=facts.closed_form,
        restrictions=facts.restrictions,
        notes=(*weights.get("notes", ()), *source.notes, *downloads(cells)),
        parity=tuple(rungs),
        graphs={done.facts.row.label: done.facts.graph for done in outcome.files if done.facts.graph is not None},
        bench=tuple(cells),
        not_measured=outcome.not_measured,
        int8=int8,
        artifacts=tuple(rows),
        engines=engines,
        layers=_layers([done.facts for done in outcome.files]),
        suggestion=suggestion(rows, cells, recipe.export.accuracy_loss, int8, engines),
        files=listing(files, root),
    )


def _sizes(facts: CompressFacts, rows: Sequence[FileRow]) -> tuple[SizeBudget, ...]:
    """The budgets of files, with the bytes that these have."""
    made = {row.precision: row.bytes for row in rows if row.model == "compressed" and row.refused is None}
    return tuple(each.model_copy(update={"bytes": made.get(each.precision)}) for each in facts.sizes)


def downloads(cells: Sequence[BenchRow]) -> list[str]:
    """What users fetch beside a file for each built-in target on which one was timed, as sentences."""
    timed = dict.fromkeys(row.target for row in cells if is_target(row.target))
    fetched = [(name, found) for name in timed if (found := get_target(name).runtime_download()) is not None]
    return [
        f"With a file for {name} users download its runtime once, {file}: {size(count)}."
        for name, (file, count) in fetched
    ]


def relative_error_increase(
    dense: Counts, compressed: Counts, output: Output = "logits"
) -> tuple[float | None, str | None]:
    """((1 − acc_c)/(1 − acc_dense) − 1, None), or (None, why there is no such number)."""
    if dense.wrong is None or dense.total is None or compressed.wrong is None or compressed.total is None:
        unread = f"the outputs are {WORDS[output]}" + ("" if output in FEATURES else ", and labels are not read")
        return None, "the data has no labels" if output == "logits" else unread
    if dense.wrong == 0:
        return None, f"the dense model makes no error on {dense.total} images"
    return (compressed.wrong / compressed.total) / (dense.wrong / dense.total) - 1, None


def _shipped(model: Figures, file: FileFacts) -> Figures:
    """Params and MACs of a model, bytes and accuracy of the ONNX file that ships it."""
    row = file.row
    counts = {name: getattr(row, name) for name in Counts.model_fields}
    return Figures(params=model.params, macs=model.macs, bytes=row.bytes or 0, **counts)


def _stages(outcome: Outcome) -> tuple[StageRow, ...]:
    """One row per form of the model, in order; the ONNX file has no count of parameters of its own."""
    deploy, tuned, onnx = outcome.deploy, outcome.finetune, outcome.files[1]
    weighing = outcome.weigh.seconds if outcome.weigh else 0.0
    forms: list[tuple[str, Figures, float | None]] = [
        ("dense", outcome.dense.facts, outcome.dense.seconds),
        ("compressed", outcome.compress.facts.figures, weighing + outcome.compress.seconds),
        *([("finetuned", tuned.facts.figures, tuned.seconds)] if tuned else []),
        ("sliced", deploy.facts.sliced, None),
        ("split", deploy.facts.deploy, deploy.seconds),
        ("onnx", _shipped(deploy.facts.deploy, onnx.facts), onnx.seconds),
    ]
    return tuple(StageRow(name=name, seconds=seconds, **figures.model_dump()) for name, figures, seconds in forms)


def _engine(done: Done[EngineFacts]) -> EngineRow:
    facts = done.facts
    return EngineRow(**dict(facts), verdict=done.rungs[0].verdict)


def _layers(files: Sequence[FileFacts]) -> tuple[LayerRow, ...]:
    """Layer → bytes in the dense fp32 file, and in each file that could ship."""
    there = [file for file in files if file.row.refused is None]
    layers = dict.fromkeys(layer for file in there for layer in file.layers)
    return tuple(
        LayerRow(layer=layer, bytes={file.row.path: file.layers.get(layer, 0) for file in there}) for layer in layers
    )
