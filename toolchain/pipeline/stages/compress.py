"""`masked/`, `plan.json` and `allocation.json`: what is kept of the dense model, decided and held at zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from toolchain.compress.allocation import UNTIMED, Allocation, Latency
from toolchain.compress.closed_form import ClosedForm as Chosen
from toolchain.compress.outcome import FrontPoint, LatencyBudget, PrunedShare, SizeBudget
from toolchain.compress.stage import Compress, Weighing, pruned_shares
from toolchain.cost import RANK, FileCost, LatencyTable
from toolchain.files import sha256, write_json, write_text
from toolchain.model import Made, MaskedModel, TimmModel, run_stage
from toolchain.pipeline.folder import Written
from toolchain.pipeline.job import Job
from toolchain.pipeline.latency_budget import Clock, latency_of
from toolchain.pipeline.stages.base import Run, RunStage, open_as
from toolchain.pipeline.stages.weigh import Weighed
from toolchain.progress import SILENT, Progress
from toolchain.records import Record
from toolchain.report.record import BlockDamage, ClosedForm, Figures
from toolchain.surgery.load import digest_of_tensors


class CompressFacts(Record):
    """Figures of the masked model, and what the report tells of how it came about."""

    figures: Figures
    pruned_shares: tuple[PrunedShare, ...]
    damage: tuple[BlockDamage, ...]
    latency: tuple[LatencyBudget, ...]
    sizes: tuple[SizeBudget, ...]
    front: tuple[FrontPoint, ...]
    restrictions: tuple[str, ...]
    closed_form: ClosedForm | None

    @property
    def limited(self) -> tuple[SizeBudget, ...]:
        """The files that the budget limits."""
        return tuple(row for row in self.sizes if row.requested is not None)


@dataclass(frozen=True)
class Known:
    """What was measured of the dense model before it is compressed.

    Attributes:
        clocks: that time widths on the targets of the budget.
        tables: what they said.
        files: what the files cost that the budget limits.
        weighed: what each width does to the outputs; None where the method does not ask.
    """

    clocks: Sequence[Clock]
    tables: Sequence[LatencyTable]
    files: Sequence[FileCost]
    weighed: Weighed | None


@dataclass(frozen=True)
class Masked(RunStage[CompressFacts]):
    """The dense model, compressed within the budget by what is known of it."""

    run: Run
    dense: TimmModel
    known: Known
    name = "compress"
    facts = CompressFacts

    @property
    def inputs(self) -> Sequence[Any]:
        job, root, known = self.run.job, self.run.root, self.known
        return [
            sha256(root / "dense" / "model.safetensors"),
            sha256(root / "dense" / "model.json"),
            job.recipe.compress.model_dump(mode="json"),
            job.recipe.budget.model_dump(mode="json"),
            dict(job.problem.choices.multiples),
            job.source.digest,
            [table.model_dump(mode="json") for table in known.tables],
            [asdict(file) for file in known.files],
            None if known.weighed is None else sha256(known.weighed.path),
        ]

    @property
    def entries(self) -> Iterable[object]:
        return self.run.job.problem.method.entries

    def work(self, key: str) -> Made[Written, CompressFacts]:
        run, dense, root, known = self.run, self.dense, self.run.root, self.known
        latency = latency_of(known.clocks, known.tables)
        weighing = None if known.weighed is None else known.weighed.weighing()
        scratch = run.space.scratch(self.name)
        compressed = compress(run.job, dense, latency, known.files, scratch, key, run.progress, weighing)
        masked, allocation = compressed.artifact, compressed.facts
        write_json(root / "allocation.json", allocation.to_dict())
        write_text(root / "plan.json", masked.plan.to_json())
        saved = run.saved("masked", masked, self.folder)
        facts = CompressFacts(
            figures=saved.facts,
            pruned_shares=tuple(pruned_shares(masked)),
            damage=tuple(_damages(masked, allocation.damage)),
            latency=allocation.latency,
            sizes=allocation.files,
            front=allocation.front,
            restrictions=tuple(dense.family.restrictions(dense.module)),
            closed_form=closed_form(masked.plan.provenance.get("closed_form", {})),
        )
        return Made((root / "allocation.json", root / "plan.json", self.folder), facts, saved.rungs)

    @property
    def folder(self) -> Path:
        """The folder of the masked model."""
        return self.run.root / "masked"

    def model(self) -> MaskedModel:
        """The model in the folder."""
        return open_as(self.folder, MaskedModel)


def compress(
    job: Job,
    dense: TimmModel,
    latency: Latency = UNTIMED,
    files: Sequence[FileCost] = (),
    checkpoint: Path | None = None,
    key: str = "",
    progress: Progress = SILENT,
    weighing: Weighing | None = None,
) -> Made[MaskedModel, Allocation]:
    """The masked model of a job's dense model, with how wide each layer stays and what that costs.

    Args:
        job: the recipe.
        dense: its dense model; the plan's provenance keeps the digest of its tensors as "dense_sha256".
        latency: tables of the targets of the budget, and how widths are timed.
        files: what the files cost that the budget limits.
        checkpoint, key: of training, where the method trains.
        progress: told how far compression is.
        weighing: what each width does to the outputs, where that is known.
    """
    dense = replace(dense, provenance={**dense.provenance, "dense_sha256": digest_of_tensors(dense.module)})
    problem = replace(job.problem, dense=dense).timed(latency.tables).sized(files)
    return run_stage(Compress(job.source, latency.check, checkpoint, key, progress, weighing), problem)


def closed_form(facts: Mapping[str, object]) -> ClosedForm | None:
    """What a plan says that the closed form chose; None if there was none."""
    if not facts:
        return None
    chosen = TypeAdapter(Chosen).validate_python(facts)
    best = chosen.kl[f"{chosen.beta}{' head' if chosen.head_refitted else ''}"]
    finite = best is not None and math.isfinite(best)
    return ClosedForm(beta=chosen.beta, head_refitted=chosen.head_refitted, kl=best if finite else None)


def _damages(masked: MaskedModel, damage: Mapping[tuple[str, str], float]) -> Iterator[BlockDamage]:
    """What each width that was weighed does to the output, beside its block."""
    blocks = masked.family.blocks(masked.module)
    for (module, unit), nats in damage.items():
        block = next(block.path for block in blocks if block.holds(module))
        yield BlockDamage(block=block, kind=f"rank.{module.rpartition('.')[2]}" if unit == RANK else unit, nats=nats)
