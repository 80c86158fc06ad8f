"""A recipe, looked at whole before any work: model, data, targets and allocation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from toolchain.artifact import Preprocess, TimmModel, digest_of, run_stage
from toolchain.compress.method import Allocation, allocate, check_names, effective
from toolchain.compress.stage import Compress
from toolchain.data import DataSource, open_source
from toolchain.errors import RecipeError, StorageError, TargetUnavailable
from toolchain.export.stage import check_section
from toolchain.families import Family
from toolchain.plan import ModelRef
from toolchain.recipe import Recipe
from toolchain.surgery.load import load_dense, randomise_untrained
from toolchain.targets import get_target
from toolchain.training.loop import Progress
from toolchain.training.stages import Train, require_labels


def tool() -> str:
    """Name and version of this program."""
    return f"slimvit {version('slimvit')}"


@dataclass(frozen=True)
class Job:
    """A recipe that was looked at whole: everything that can be refused before any work has been."""

    recipe: Recipe
    source: DataSource
    dense: TimmModel
    allocation: Allocation
    multiples: Mapping[str, int]


def prepare(recipe: Recipe, *, weights: bool = True) -> Job:
    """The recipe with its model, data and allocation.

    Args:
        recipe: what to do.
        weights: False leaves the weights unread, for `slimvit plan` and a dry run.

    Raises:
        RecipeError, ModelError, DataError, BudgetError: something cannot be done; the message says what would.
        TargetUnavailable: a target of [engine] or [bench] is not there.
        StorageError, ArtifactError: the checkpoint cannot be read.
    """
    section = recipe.compress
    check_names(section)
    check_section(recipe.export)
    multiples = _multiples(recipe)
    if recipe.model.checkpoint and not Path(recipe.model.checkpoint).is_file():
        raise StorageError(f"there is no checkpoint {recipe.model.checkpoint}")
    module, family, provenance = load_dense(recipe.model, weights=weights, seed=section.seed)
    source, dense = _with_data(recipe, module, family, provenance)
    untrained = provenance["weights"] == "initial" and weights
    if untrained and source.synthetic:
        randomise_untrained(module, section.seed)
    elif untrained and recipe.train is None:
        raise RecipeError(
            "the model has no weights: set model.checkpoint, model.pretrained = true or a [train] section; "
            "or data.source = 'none' for size and latency only"
        )
    if not source.synthetic:
        source.check_classes(module.num_classes)  # type: ignore[arg-type]
        _check_labels(recipe, source)
    allocation = allocate(dense, effective(section, synthetic=source.synthetic), recipe.budget, multiples)
    job = Job(recipe, source, dense, allocation, multiples)
    if section.method != "none":
        Compress(section, recipe.budget, source, multiples).requires(dense)
    return job


def _check_labels(recipe: Recipe, source: DataSource) -> None:
    """Raises DataError if a section trains and the source has no labels."""
    if recipe.train is not None and not recipe.model.checkpoint:
        require_labels(source, "[train]")
    if recipe.finetune.epochs:
        require_labels(source, "[finetune]")


def _with_data(
    recipe: Recipe, module: nn.Module, family: Family, provenance: Mapping[str, Any]
) -> tuple[DataSource, TimmModel]:
    data = recipe.data
    source = open_source(
        data.source,
        input_size=family.input_size(module),
        data_config=resolve_model_data_config(module),  # type: ignore[no-untyped-call]
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        calibration_images=data.calibration_images,
        seed=recipe.compress.seed,
    )
    preprocess = Preprocess(
        family.input_size(module), source.mean, source.std, source.interpolation, source.crop_pct, source.crop_mode
    )
    ref = ModelRef(name=recipe.model.name, kwargs=recipe.model.kwargs)
    return source, TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, provenance)


def _multiples(recipe: Recipe) -> dict[str, int]:
    """Unit → the least common multiple that the recipe's targets prefer; raises TargetUnavailable."""
    names = [*(recipe.bench.targets if recipe.bench else ()), *(recipe.engine.targets if recipe.engine else ())]
    found: dict[str, int] = {}
    for name in dict.fromkeys(names):
        target = get_target(name)
        info = target.probe()
        if recipe.bench and name in recipe.bench.targets and info.details.get("run", "yes").startswith("no"):
            raise TargetUnavailable(name, f"it can build here but not be measured ({info.details['run']})")
        for unit, multiple in target.profile.multiples.items():
            found[unit] = math.lcm(found.get(unit, 1), multiple)
    return found


def trains(job: Job) -> bool:
    """Whether the recipe asks for a baseline to be trained: [train], real images, and no checkpoint."""
    has_checkpoint = job.dense.provenance["weights"] == "checkpoint"
    return job.recipe.train is not None and not has_checkpoint and not job.source.synthetic


def dense_key(job: Job) -> str:
    """Digest of everything that the dense weights depend on; recipes that share it share the baseline."""
    recipe = job.recipe
    return digest_of(
        [tool(), torch.__version__, timm.__version__, torch.get_num_threads()],
        recipe.model.model_dump(mode="json"),
        dict(job.dense.provenance),
        job.source.digest,
        recipe.compress.seed,
        recipe.train.model_dump(mode="json") if recipe.train is not None and trains(job) else None,
    )


def trained(job: Job, checkpoint: Path | None = None, progress: Callable[[Progress], None] | None = None) -> TimmModel:
    """The dense model of a job, trained if the recipe asks for it; `checkpoint` is resumed from and written to."""
    if not trains(job):
        return job.dense
    assert job.recipe.train is not None
    stage = Train(job.recipe.train, job.source, job.recipe.compress.seed, checkpoint, dense_key(job), progress)
    return run_stage(stage, job.dense)
