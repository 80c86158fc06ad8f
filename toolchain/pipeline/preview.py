"""Previews the allocation of a run, for `slimvit plan` and `slimvit run --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolchain.compress.allocation import Allocation, allocate
from toolchain.compress.stage import Compress
from toolchain.cost import FileCost
from toolchain.devices.device import Devices
from toolchain.errors import ArtifactError, DataError, ModelError, StorageError
from toolchain.model import TimmModel
from toolchain.pipeline.job import Job, prepare
from toolchain.pipeline.latency_budget import latency_of
from toolchain.pipeline.stages.base import open_as
from toolchain.pipeline.stages.dense import baseline_folder, trains
from toolchain.pipeline.stages.latency import clocks
from toolchain.pipeline.stages.rounding import rounded
from toolchain.progress import SILENT, Progress
from toolchain.recipe import Recipe

LEARNED = "widths are learned: a global threshold moves them between layers; their total stays within the budget"


@dataclass(frozen=True)
class Preview:
    """The allocation that a run will write, and why the run's widths may still differ, or ""."""

    job: Job
    allocation: Allocation
    note: str


def preview(recipe: Recipe, *, measure: bool = True, progress: Progress = SILENT) -> Preview:
    """What a run of a recipe will decide.

    Nothing is changed, and no folder but the user's cache of latency tables is written. Weights and images are read only
    where widths follow from measured damage.

    Args:
        recipe: what to do.
        measure: False stays with what shapes alone tell.
        progress: told how far it is.

    Raises:
        SlimvitError: as `prepare` with `shapes_only`; measuring latency failed.
    """
    job, why = prepare(recipe, shapes_only=True), ""
    if not measure:
        return from_shapes(job)
    method, dense = job.problem.method, job.dense
    files = list[FileCost]()
    if method.weighs or recipe.budget.files:
        try:
            full = prepare(recipe)
            dense, job = _baseline(full), full
            files = rounded(full, dense)
        except (DataError, ModelError, StorageError) as error:
            why = f"uniform widths; those by measured damage come later: {error}"
    with Devices() as devices:
        latency = latency_of(clocks(job, dense, devices, progress))
        problem = replace(job.problem, dense=dense).timed(latency.tables).sized(files)
        if why:
            why = "; ".join([why, *_of_files(job)])
            return Preview(job, allocate(problem.options[0], (), latency.check), why)
        decided, _ = Compress(job.source, latency.check, progress=progress).decide(problem)
    return Preview(job, decided, LEARNED if method.allocation.over_layers else "")


def from_shapes(job: Job) -> Preview:
    """The preview that needs only shapes, no weights and no images."""
    method = job.problem.method
    notes = [LEARNED] if method.allocation.over_layers else []
    if job.recipe.budget.latency:
        notes = ["latency budgets were left out: `slimvit plan` and `slimvit run` measure what they mean"]
    elif method.weighs:
        notes = ["uniform widths; `slimvit plan`, and `slimvit run` without --dry-run, choose them by measured damage"]
    notes += _of_files(job)
    return Preview(job, Allocation.uniform(job.problem.options[0]), "; ".join(notes))


def _of_files(job: Job) -> list[str]:
    """What is not known of files until they are measured, as sentences without a full stop."""
    files = job.recipe.budget.files
    first = job.problem.options[0].file
    return [
        *(["sizes of files are of their weights alone, and the rest is measured later"] if files else []),
        *([f"which precision is taken follows from damage; these widths are for {first}"] if first else []),
    ]


def _baseline(job: Job) -> TimmModel:
    """The dense model of a job, where no training is needed for it; raises StorageError if it is."""
    if not trains(job):
        return job.dense
    try:
        return open_as(baseline_folder(job), TimmModel)
    except (ArtifactError, StorageError):
        raise StorageError("`slimvit run` has not trained the baseline yet") from None
