"""A recipe, looked at whole before any work: model, data, targets and allocation."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config

from toolchain.compress.decide import Latency, decide
from toolchain.compress.method import Allocation, allocate, check_names, choices_for, effective
from toolchain.compress.stage import Compress
from toolchain.data import DataSource, open_source
from toolchain.devices.device import connect, probe, require_direct
from toolchain.devices.targets_toml import LocalSettings, named_target
from toolchain.errors import ArtifactError, DataError, ModelError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.engine import require_engines
from toolchain.export.precision import expanded
from toolchain.export.probabilities import require_probabilities
from toolchain.export.stage import check_section
from toolchain.files import digest_of, user_cache
from toolchain.measure.experiment import require_threads, workload_on
from toolchain.model import MaskedModel, Preprocess, TimmModel, run_stage
from toolchain.outputs import WORDS
from toolchain.pipeline.latency_budget import Clock, Setting, latency_of
from toolchain.progress import SILENT, Progress
from toolchain.recipe import CompressSection, DataSection, Recipe
from toolchain.surgery.load import Loaded, load_dense, randomise_untrained
from toolchain.surgery.replay import load_model
from toolchain.targets import get_target
from toolchain.training.stages import Train, require_labels, require_teacher

SYNTHETIC = "none"  # the source of seeded noise
LEARNED = "widths are learned: a global threshold moves them between layers; their total stays within the budget"


def tool() -> str:
    """Name and version of this program."""
    return f"slimvit {version('slimvit')}"


BENCH, ENGINE = "bench.targets", "engine.targets"


@dataclass(frozen=True)
class Start:
    """A recipe's dense model and its data: everything that what comes after works on."""

    recipe: Recipe
    source: DataSource
    dense: TimmModel

    @property
    def method(self) -> CompressSection:
        """[compress] as it is carried out on the recipe's data."""
        return effective(self.recipe.compress, synthetic=self.recipe.data.source == SYNTHETIC)


@dataclass(frozen=True)
class Job(Start):
    """A recipe that was looked at whole: everything that can be refused before any work has been."""

    allocation: Allocation
    multiples: Mapping[str, int]


def prepare(recipe: Recipe, *, fetch: bool = True, shapes_only: bool = False, met: Collection[str] = ()) -> Job:
    """The recipe with its model, data and allocation.

    Args:
        recipe: what to do.
        fetch: False leaves pretrained weights where they are and takes initial ones, where a folder has them.
        shapes_only: True reads neither weights nor images, for `slimvit plan`; the source is then a synthetic one.
        met: devices that have been measured on and may be off now.

    Raises:
        RecipeError, ModelError, DataError, BudgetError: something cannot be done; the message says what would.
        TargetUnavailable: a target of [engine] or [bench] is not there.
        StorageError, ArtifactError: the checkpoint cannot be read.
    """
    section = recipe.compress
    recipe.require_budget()
    check_names(section)
    check_section(recipe.export)
    multiples = _multiples(recipe, met)
    if recipe.engine is not None:
        require_engines(recipe.engine, list(expanded(recipe.export.precisions)))
    start = begin(recipe, fetch=fetch, shapes_only=shapes_only)
    if not start.source.synthetic and recipe.finetune.epochs:
        require_teacher(recipe.finetune, start.source)
    if recipe.export.softmax:
        require_probabilities(start.dense.output)
    allocation = allocate(start.dense, start.method, recipe.budget, multiples)
    if section.method != "none":
        Compress(section, recipe.budget, start.source, multiples).requires(start.dense)
    return Job(start.recipe, start.source, start.dense, allocation, multiples)


def begin(recipe: Recipe, *, fetch: bool = True, shapes_only: bool = False) -> Start:
    """The recipe with its model and data; what no other section says is looked at.

    Args:
        recipe: what to do.
        fetch, shapes_only: as in `prepare`.

    Raises:
        RecipeError, ModelError, DataError, StorageError, ArtifactError: as `prepare`.
    """
    if recipe.model.checkpoint and not Path(recipe.model.checkpoint).exists():
        raise StorageError(f"there is no checkpoint {recipe.model.checkpoint}")
    synthetic = recipe.data.source == SYNTHETIC
    loaded = load_dense(
        recipe.model,
        weights=not shapes_only,
        fetch=fetch,
        seed=recipe.compress.seed,
        may_be_untrained=synthetic or recipe.train is not None,
    )
    untrained = not (recipe.model.checkpoint or recipe.model.pretrained)
    if untrained and synthetic:
        randomise_untrained(loaded.module, recipe.compress.seed)
    elif untrained and recipe.train is None:
        raise RecipeError(
            "the model has no weights: set model.checkpoint, model.pretrained = true or a [train] section; "
            "or data.source = 'none' for size and latency only"
        )
    if recipe.train is not None and recipe.model.checkpoint:
        loaded = loaded.noted("[train] is not carried out: model.checkpoint has the weights.")
    data = recipe.data.model_copy(update={"source": SYNTHETIC, "classes": ""}) if shapes_only else recipe.data
    source, dense = _with_data(data, loaded)
    source = _judging(source, dense)
    if not source.synthetic:
        if recipe.train is not None and not recipe.model.checkpoint:
            require_labels(source, "[train]")
        source.to_compare()
    return Start(recipe, source, dense)


def _judging(source: DataSource, dense: TimmModel) -> DataSource:
    """The source as it judges a model: without labels where the recipe says that its outputs are no classes, and noted so.

    Raises:
        ModelError: the labels do not fit the model.
    """
    if dense.ref.output == "logits" and dense.module.num_classes == 1:
        raise ModelError(
            "the model has one output, and the softmax of one number is always 1: set model.output = 'regression' for a "
            "number, or 'multi-label' where a sigmoid reads it"
        )
    if dense.ref.output is None and dense.output != "logits":
        note = (
            "The model has one output, which is taken for a number (model.output = 'regression'): it is held against the "
            "dense model's by squared difference. If a sigmoid reads it, set model.output = 'multi-label'."
        )
        source = source.noted(note)
    if source.synthetic or not source.labelled:
        return source
    if dense.label_classes is None and dense.ref.output is not None:
        return source.unlabelled(
            f"Labels are not read: the outputs are {WORDS[dense.output]}, and labels name classes."
        )
    source.check_classes(dense.label_classes)
    return source


def _with_data(data: DataSection, loaded: Loaded) -> tuple[DataSource, TimmModel]:
    module, family = loaded.module, loaded.family
    source = open_source(
        data.source,
        input_size=family.input_size(module),
        data_config=resolve_model_data_config(module),  # type: ignore[no-untyped-call]
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        calibration_images=data.calibration_images,
        classes=data.classes,
        exif_orientation=data.exif_orientation,
        workers=data.workers,
        outputs=module.num_classes,  # type: ignore[arg-type]
    )
    preprocess = Preprocess(
        family.input_size(module),
        source.mean,
        source.std,
        source.interpolation,
        source.crop_pct,
        source.crop_mode,
        source.exif_orientation,
    )
    units = tuple(family.unit_groups(module))
    return source, TimmModel(loaded.ref, module, family, units, preprocess, loaded.provenance)


def _multiples(recipe: Recipe, met: Collection[str]) -> dict[str, int]:
    """Unit → the least common multiple that the recipe's targets prefer; raises TargetUnavailable."""
    found: dict[str, int] = {}
    for name, section in _targets(recipe).items():
        settings = named_target(name)
        if section == ENGINE and settings.runtime != name:
            raise TargetUnavailable(name, f"{ENGINE} takes built-in targets; one of targets.toml can be in {BENCH}.")
        require_direct(name, settings)
        if section == BENCH and recipe.bench is not None:
            require_threads(settings.runtime, recipe.bench.threads)
        known = name in met and not isinstance(settings, LocalSettings)
        missing = "" if known else probe(name, settings).cannot_run
        target = get_target(settings.runtime)
        if section != ENGINE and (missing or not target.measures):
            why = f" ({missing})" if missing else ""
            raise TargetUnavailable(
                name, f"it builds engines here and runs none{why}, so nothing is measured; remove it from {section}"
            )
        for unit, multiple in target.profile.multiples.items():
            found[unit] = math.lcm(found.get(unit, 1), multiple)
    return found


def _targets(recipe: Recipe) -> dict[str, str]:
    """Every target of a recipe, and the key that names it; of several, one that measures."""
    sections = {
        ENGINE: recipe.engine.targets if recipe.engine else (),
        "budget.latency": tuple(recipe.budget.latency),
        BENCH: recipe.bench.targets if recipe.bench else (),
    }
    return {name: key for key, names in sections.items() for name in names}


def trains(job: Start) -> bool:
    """Whether the recipe asks for a baseline to be trained: [train], real images, and no checkpoint."""
    has_checkpoint = job.dense.provenance["weights"] == "checkpoint"
    return job.recipe.train is not None and not has_checkpoint and not job.source.synthetic


def step_key(name: str, inputs: Any) -> str:
    """Digest of everything that the outcome of a step depends on: its inputs, and what carries it out."""
    return digest_of(name, [tool(), torch.__version__, timm.__version__, torch.get_num_threads()], inputs)


def dense_inputs(job: Start) -> list[Any]:
    """What the dense weights depend on; recipes that share it share the baseline."""
    recipe = job.recipe
    return [
        recipe.model.model_dump(mode="json"),
        job.dense.ref.model_dump(mode="json"),
        dict(job.dense.provenance),
        job.source.digest,
        recipe.compress.seed,
        recipe.train.model_dump(mode="json") if recipe.train is not None and trains(job) else None,
    ]


def trained(job: Start, checkpoint: Path | None = None, key: str = "", progress: Progress = SILENT) -> TimmModel:
    """The dense model of a job, trained if the recipe asks for it.

    Args:
        job: the recipe.
        checkpoint: resumed from if it was written under the same `key`, and written to.
        key: digest of everything that the training depends on.
        progress: told how far the training is.
    """
    if not trains(job):
        return job.dense
    assert job.recipe.train is not None
    stage = Train(job.recipe.train, job.source, job.recipe.compress.seed, checkpoint, key, progress)
    return run_stage(stage, job.dense).artifact


def baseline_folder(job: Start) -> Path:
    """Where the user's cache keeps the dense model that a job trains."""
    return user_cache() / "dense" / step_key("dense", dense_inputs(job))


def clocks(job: Job, dense: TimmModel, progress: Progress) -> list[Clock]:
    """What times the widths of a dense model: one clock for each target or device on which the budget limits latency.

    Batch and threads are the first of [bench]; without one, 1 and what targets.toml says of the device.

    Args:
        job: the recipe.
        dense: its dense model; only shapes matter.
        progress: who is told while something is measured.
    """
    recipe = job.recipe
    batch, threads = (recipe.bench.batch[0], recipe.bench.threads[0]) if recipe.bench else (1, None)
    choices = choices_for(dense.module, dense.family, dense.groups, job.method, job.multiples)
    timers = []
    for target in recipe.budget.latency:
        device = connect(target, named_target(target))
        workload = workload_on(device, batch=batch, threads=threads)
        setting = Setting(device, workload, recipe.export.opset, recipe.export.simplify)
        timers.append(Clock(dense, choices, setting, progress))
    return timers


def compressed(
    job: Job,
    dense: TimmModel,
    latency: Latency,
    *,
    checkpoint: Path | None = None,
    key: str = "",
    progress: Progress = SILENT,
) -> tuple[MaskedModel, Allocation]:
    """(the masked model, how wide each layer stays and what that costs) of a job's dense model.

    Args:
        job: the recipe.
        dense: its dense model, with "weights_sha256" in the provenance.
        latency: tables of the targets of the budget, and how widths are timed.
        checkpoint, key: of training, where the method trains.
        progress: told how far compression is.
    """
    settings = (job.recipe.compress, job.recipe.budget, job.source, job.multiples)
    made = run_stage(Compress(*settings, checkpoint, key, progress, latency), dense)
    return made.artifact, made.facts


def preview(recipe: Recipe, *, measure: bool = True, progress: Progress = SILENT) -> tuple[Job, Allocation, str]:
    """(the job, the allocation that a run will write, why the run's widths may still differ or "").

    Nothing is changed, and no folder but the user's cache of latency tables is written. Weights and images are read only
    where widths follow from measured damage.

    Args:
        recipe: what to do.
        measure: False stays with what shapes alone tell.
        progress: who is told.

    Raises:
        SlimvitError: as `prepare` with `shapes_only`; measuring latency failed.
    """
    job = prepare(recipe, shapes_only=True)
    if not measure:
        return job, job.allocation, unmeasured(job)
    given, method, source, why = job.dense, job.method, job.source, ""
    if method.allocation == "solver":
        try:
            full = prepare(recipe)
            given, source = _baseline(full), full.source
            job = full
        except (DataError, ModelError, StorageError) as error:
            method, why = method.model_copy(update={"allocation": "uniform"}), str(error)
    latency = latency_of(clocks(job, given, progress))
    found = decide(given, method, recipe.budget, job.multiples, source, latency, progress.at)
    if why:
        return job, replace(found, learned=True), f"uniform widths; those by measured damage come later: {why}"
    return job, found, "" if job.method.allocation != "global" else LEARNED


def unmeasured(job: Job) -> str:
    """What shapes alone do not tell about a job's widths; "" if they tell all."""
    if job.recipe.budget.latency:
        return "latency limits were left out: `slimvit plan` and `slimvit run` measure what they mean"
    if job.method.allocation == "solver":
        return "uniform widths; `slimvit plan` and `slimvit run` choose them by measured damage"
    return LEARNED if job.allocation.learned else ""


def _baseline(job: Job) -> TimmModel:
    """The dense model of a job, where no training is needed for it; raises StorageError if it is."""
    if not trains(job):
        return job.dense
    try:
        model = load_model(baseline_folder(job))
    except (ArtifactError, StorageError):
        raise StorageError("`slimvit run` has not trained the baseline yet") from None
    assert isinstance(model, TimmModel)
    return model
