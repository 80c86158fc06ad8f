"""Checks a whole recipe before any work: model, data, targets and allocation."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from timm.data.config import resolve_model_data_config

from toolchain.artifacts import ARTIFACTS
from toolchain.artifacts.model_folder import ModelFolder
from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.compress.method import UNITS, Method
from toolchain.compress.problem import Problem
from toolchain.data import DataSource, open_source
from toolchain.data.transforms import Wanted
from toolchain.devices.device import probe, require_direct
from toolchain.devices.targets_toml import LocalSettings, named_target
from toolchain.errors import ModelError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.engine import builds, options_of, require_engines
from toolchain.export.precision import EITHER, PRECISIONS, expanded, file_cost, int8_kinds, product_of
from toolchain.export.probabilities import require_probabilities
from toolchain.export.stage import check_section
from toolchain.files import digest_of, sha256
from toolchain.measure.experiment import require_threads
from toolchain.model import Preprocess, TimmModel
from toolchain.outputs import CLASS_NAMES, FEATURES, WORDS
from toolchain.recipe import ALIGN, ANY, SYNTHETIC, BenchSection, BudgetSection, DataSection, EngineSection, Recipe
from toolchain.surgery.load import Loaded, load_dense, randomise_untrained
from toolchain.targets import BuildOptions, Target, get_target
from toolchain.training.stages import UNTRAINED, require_classes, require_labels, require_teacher


@cache
def code() -> str:
    """Digest of slimvit's own sources, so that a checkout that changed takes nothing over from before."""
    root = Path(__file__).resolve().parents[1]
    return digest_of([(path.relative_to(root).as_posix(), sha256(path)) for path in sorted(root.rglob("*.py"))])


BENCH, ENGINE = "bench.targets", "engine.targets"


@dataclass(frozen=True)
class Start:
    """A recipe's dense model and its data, on which all stages work.

    Attributes:
        labelled: of features, the source with the labels that judge them through their neighbours; what trains and
            compresses is given `source`, which has none then. None where there are no labels, or the outputs are classes.
    """

    recipe: Recipe
    source: DataSource
    dense: TimmModel
    labelled: DataSource | None


@dataclass(frozen=True)
class Job(Start):
    """A checked recipe: every error that can be found before any work was raised."""

    problem: Problem


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
    Method.of(section)  # refuses names before anything is read
    check_section(recipe.export)
    multiples = _multiples(recipe, met)
    if recipe.engine is not None:
        require_engines(recipe.engine, list(expanded(recipe.export.precisions)))
        if recipe.bench is not None:
            _require_batches(recipe.engine, recipe.bench)
    if recipe.bench is not None:
        _require_timed(recipe, recipe.bench)
    start = begin(recipe, fetch=fetch, shapes_only=shapes_only)
    if not start.source.synthetic and recipe.finetune.epochs:
        require_teacher(recipe.finetune, start.source, start.dense)
    if recipe.export.softmax:
        require_probabilities(start.dense.output)
    synthetic = recipe.data.source == SYNTHETIC
    request = _files_named(recipe)
    precisions = tuple(expanded(recipe.export.precisions) if ANY in request.files else request.files)
    problem = Problem.of(
        start.dense, section, request, multiples, files=[file_cost(name) for name in precisions], synthetic=synthetic
    )
    method = Method.of(section, synthetic=start.source.synthetic)  # of shapes alone nothing is learned
    method.require(start.source, start.dense)
    if ANY in request.files and not (shapes_only or (problem.method.weighs and problem.sites)):
        raise RecipeError(
            f"budget.size.{ANY} takes the precision that does the least damage, and here none is measured (that needs images, "
            f"and compress.allocation = 'solver'); name one: budget.size.{precisions[-1]}"
        )
    return Job(start.recipe, start.source, start.dense, start.labelled, problem)


def precisions_of(recipe: Recipe) -> tuple[str, ...]:
    """The precisions of a recipe's files, fp32 first, of which there always is one."""
    return tuple(dict.fromkeys((FP32, *expanded(recipe.export.precisions))))


def _files_named(recipe: Recipe) -> BudgetSection:
    """The budget with every kind of int8 named; raises RecipeError where a file is limited that the recipe does not make."""
    budget, written = recipe.budget, precisions_of(recipe)
    if not budget.files or ANY in budget.files:
        return budget
    files = dict(budget.files)
    for each in expanded([name], "budget.size") if (name := EITHER) in files else ():
        files.setdefault(each, files[EITHER])  # what names one kind says more than what names both
    files.pop(EITHER, None)
    for each in expanded(tuple(files), "budget.size"):
        if each not in written:
            raise RecipeError(
                f"budget.size.{each}: the recipe makes no such file; add {each!r} to export.precisions, now {list(written)}"
            )
    return budget.model_copy(update={"size": files})


def begin(recipe: Recipe, *, fetch: bool = True, shapes_only: bool = False) -> Start:
    """The recipe with its model and data; what no other section says is looked at.

    Args:
        recipe: what to do.
        fetch, shapes_only: as in `prepare`.

    Raises:
        RecipeError, ModelError, DataError, StorageError, ArtifactError: as `prepare`.
    """
    if not (recipe.data.source or shapes_only):
        raise RecipeError(
            "recipe data.source is missing: name your pictures, such as 'images:~/pictures' or 'imagefolder:PATH'; 'none' is for "
            "size and latency alone"
        )
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
    shapeless = {"source": SYNTHETIC, "classes": "", "image_column": None, "label_column": None}
    data = recipe.data.model_copy(update=shapeless) if shapes_only else recipe.data
    whole, dense = _with_data(data, loaded)
    learns = recipe.train is not None and not recipe.model.checkpoint
    if learns:  # outputs will stand for the classes of the source
        dense = replace(dense, provenance={key: each for key, each in dense.provenance.items() if key != CLASS_NAMES})
    source = _judging(whole, dense)
    if not source.synthetic:
        if learns:
            require_classes("[train]", dense, UNTRAINED)
            require_labels(source, "[train]")
        else:
            source = source.order_noted(dense.class_names)
        source.to_compare()
    return Start(recipe, source, dense, whole if whole.labelled and dense.output in FEATURES else None)


def _judging(source: DataSource, dense: TimmModel) -> DataSource:
    """Drops labels that cannot score this model's outputs, and adds a note that says why; raises ModelError if labels do not fit."""
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
    if dense.output in FEATURES:
        return source.unlabelled(
            f"Labels are not trained on: the outputs are {WORDS[dense.output]}. They only count how many test images lie nearest "
            "to images of their own class (k-NN)."
        )
    if dense.label_classes is None and dense.ref.output is not None:
        return source.unlabelled(
            f"Labels are not read: the outputs are {WORDS[dense.output]}, and labels name classes."
        )
    source.check_classes(dense.label_classes, dense.class_names)
    return source


def _with_data(data: DataSection, loaded: Loaded) -> tuple[DataSource, TimmModel]:
    module, family = loaded.module, loaded.family
    source = open_source(
        data.source,
        Wanted(
            family.input_size(module),
            resolve_model_data_config(module),  # type: ignore[no-untyped-call]
            mean=data.mean,
            std=data.std,
            crop_pct=data.crop_pct,
            calibration_images=data.calibration_images,
            exif_orientation=data.exif_orientation,
            workers=data.workers,
            mirror=data.mirror,
            interpolation=data.interpolation,
            crop_mode=data.crop_mode,
            image_column=data.image_column,
            label_column=data.label_column,
        ),
        classes=data.classes,
        outputs=None if loaded.ref.output in FEATURES else module.num_classes or None,  # type: ignore[arg-type]
    )
    preprocess = Preprocess(**asdict(source.preprocessing))
    units = tuple(family.unit_groups(module))
    return source, TimmModel(loaded.ref, module, family, units, preprocess, loaded.provenance)


def _multiples(recipe: Recipe, met: Collection[str]) -> dict[str, int]:
    """Unit → the multiple that [compress] asks for, else the least common one of the targets, else `ALIGN`; raises TargetUnavailable."""
    multiples: dict[str, int] = {}
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
        opens = {ModelFolder.name, OnnxFile.name} & set(target.takes)
        if name in recipe.budget.latency and not opens:
            raise TargetUnavailable(
                name,
                f"it opens {_kinds(target)} alone, and widths are timed as ONNX files; remove it from budget.latency",
            )
        built = section == BENCH and recipe.engine is not None and settings.runtime in recipe.engine.targets
        if section != ENGINE and not built and not opens:
            raise TargetUnavailable(
                name,
                f"it opens {_kinds(target)} alone, and this recipe builds none. "
                f"Add {'it' if settings.runtime == name else settings.runtime} to {ENGINE}, or remove it from {section}.",
            )
        for unit, multiple in target.profile.multiples.items():
            multiples[unit] = math.lcm(multiples.get(unit, 1), multiple)
    if recipe.compress.align is None and multiples:
        return multiples
    return dict.fromkeys(UNITS, recipe.compress.align or ALIGN)


def _kinds(target: Target) -> str:
    """The kinds of artifact that a target opens, in words."""
    known = [ARTIFACTS.get(kind) for kind in target.takes]
    return " and ".join(
        f"{kind if entry is None else entry.word}s" for kind, entry in zip(target.takes, known, strict=True)
    )


def _require_batches(engine: EngineSection, bench: BenchSection) -> None:
    """Raises RecipeError if a batch is to be timed that an engine does not take."""
    built, timed, most = set(engine.batch), set(bench.batch), len(engine.batch)
    wanted = sorted(timed | built if len(timed | built) <= most else timed)
    proposal = [wanted[0]] * (most - len(wanted)) + wanted
    fix = f"set engine.batch = {proposal}"
    if len(wanted) > most:
        fix = f"keep at most {most} in bench.batch, and name them in engine.batch"
    for runtime in dict.fromkeys(named_target(name).runtime for name in bench.targets):
        target = get_target(runtime)
        only = target.batches(options_of(engine))
        if runtime not in engine.targets or only is None or timed <= set(only):
            continue
        if len(wanted) <= most and target.batches(BuildOptions((proposal[0], proposal[1], proposal[2]))) == only:
            fix = f"remove them from bench.batch, or {runtime} from bench.targets"
        raise RecipeError(
            f"engines of {runtime} take batch {_listed(only)} alone, and bench.batch has {_listed(timed - set(only))} as well; {fix}"
        )


def _require_timed(recipe: Recipe, bench: BenchSection) -> None:
    """Raises RecipeError if a target would time no file of the recipe's precisions, and would be left out without a word."""
    precisions = list(expanded(recipe.export.precisions))
    timed = [*precisions, FP32] if set(int8_kinds()) & set(precisions) else precisions
    for name in bench.targets:
        runtime = named_target(name).runtime
        takes, loads = get_target(runtime).takes, get_target(runtime).loads
        whole = [each for each in timed if OnnxFile.name in takes or (ModelFolder.name in takes and each == FP32)]
        built = [
            each for each in precisions if recipe.engine and runtime in recipe.engine.targets and builds(runtime, each)
        ]
        if not any(product_of(each) in loads for each in (*whole, *built)):
            able = [each for each in (FP32, *PRECISIONS) if product_of(each) in loads]
            raise RecipeError(
                f"{name} runs no file of export.precisions = {precisions}; add {' or '.join(able)}, or remove it from {BENCH}"
            )


def _listed(batches: Collection[int]) -> str:
    return ", ".join(map(str, sorted(batches)))


def _targets(recipe: Recipe) -> dict[str, str]:
    """Every target of a recipe, and the key that names it; of several, one that measures."""
    sections = {
        ENGINE: recipe.engine.targets if recipe.engine else (),
        "budget.latency": tuple(recipe.budget.latency),
        BENCH: recipe.bench.targets if recipe.bench else (),
    }
    return {name: key for key, names in sections.items() for name in names}
