"""Carries out a recipe: its stages in order, each checked, recorded, and taken up again where a killed run stopped."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from toolchain.artifacts.onnx_file import FP32
from toolchain.devices.device import Device, Devices
from toolchain.errors import ArtifactError, ParityError, StorageError
from toolchain.export.engine import builds
from toolchain.export.precision import expanded, int8_kinds
from toolchain.measure.compare import compare as compare_artifacts
from toolchain.measure.samples import Parity
from toolchain.model import TimmModel
from toolchain.parity import Rung
from toolchain.pipeline.assemble import Outcome, assemble
from toolchain.pipeline.folder import Done, Nothing, Workspace
from toolchain.pipeline.job import Job, prepare
from toolchain.pipeline.recipe_file import leave_recipe, remember
from toolchain.pipeline.stages import bench
from toolchain.pipeline.stages.base import Compare, Run
from toolchain.pipeline.stages.compress import Known, Masked
from toolchain.pipeline.stages.convert import Converted
from toolchain.pipeline.stages.dense import Dense
from toolchain.pipeline.stages.deploy import Deploy
from toolchain.pipeline.stages.elsewhere import Elsewhere, is_elsewhere
from toolchain.pipeline.stages.engine import DENSE, Engine
from toolchain.pipeline.stages.export import Exported, FileFacts, onnx_path
from toolchain.pipeline.stages.finetune import Finetuned
from toolchain.pipeline.stages.latency import Table, clocks
from toolchain.pipeline.stages.rounding import Rounded, sized
from toolchain.pipeline.stages.weigh import Weighed
from toolchain.pipeline.untimed import not_measured
from toolchain.progress import SILENT, Progress
from toolchain.recipe import ANY, Recipe
from toolchain.report.files import write_report
from toolchain.report.record import BenchRow, EngineFacts, Report
from toolchain.training.processes import require_one

log = logging.getLogger(__name__)
Proofs = Mapping[Path, Sequence[Rung]]
"""A model folder, file or engine of the run → the rungs that lead to it."""
Cell = tuple[bench.Bench, Done[BenchRow] | None]
"""A comparison with the dense model, and its outcome; None if its device is lost."""


def run(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    resume: bool = True,
    progress: Progress = SILENT,
    compare: Compare = compare_artifacts,
    others: Sequence[Path] = (),
    origin: Path | None = None,
) -> Report:
    """The report of a recipe that is carried out in the folder `out`.

    Args:
        recipe: a recipe, or the path of a recipe.toml.
        out: the folder; it is created, and a run that was interrupted there is taken up again.
        resume: False does every stage anew.
        progress: told how far the run is.
        compare: what times two artifacts against each other.
        others: folders of other runs, from which a stage of the same inputs is taken over.
        origin: the file that a recipe was read from, which the folder remembers; None where there is none, or `recipe` is its path.

    Raises:
        RecipeError: among others, several processes were started, as by `torchrun`; the message says what to do.
        TargetUnavailable: a target of the recipe is not there, before any work; or a device dropped off, or is off while
            the run is taken up again: then everything else was done, and the report says what was not measured.
        SlimvitError: see `toolchain.errors`; what was finished before stays and is reused by the next run.
    """
    require_one("a whole recipe")
    if not isinstance(recipe, Recipe):
        origin, recipe = Path(recipe), Recipe.load(Path(recipe))
    workspace = Workspace(Path(out).resolve(), resume=resume, others=[other.resolve() for other in others])
    workspace.check()
    job = prepare(recipe, met=bench.measured_on(workspace, recipe))
    if other_content(workspace.root, job):
        log.warning(
            "The pictures are not those of the run in %s: what was made or judged with them is made anew.",
            workspace.root,
        )
    with workspace.open() as space, Devices() as devices:
        if origin is not None:
            remember(origin, space)
        under_way = Run(job, space, devices, progress, compare)
        outcome = _carry_out(under_way, job)
        space.forget_all_but(under_way.done)
        files = [space.root / name for done in under_way.done.values() for name in done.outputs]
        files += leave_recipe(recipe, space)
        report = assemble(
            job, outcome, [rung for done in under_way.done.values() for rung in done.rungs], files, space.root
        )
        write_report(report, files, space.root)
    for error in (*under_way.lost.values(), *under_way.refused.values()):
        raise error
    return report


def other_content(root: Path, job: Job) -> bool:
    """Whether a run that ended in a folder read other pictures than a job does, from a source of the same kind, however prepared."""
    try:
        before = Report.load(root).data
    except (StorageError, ArtifactError):
        return False
    same_kind = before.source == job.source.identity["source"]
    return same_kind and bool(before.content) and before.content != job.source.content


def _carry_out(run: Run, job: Job) -> Outcome:
    """Every stage that a recipe asks for, in order."""
    recipe = job.recipe
    dense = run.do(stage := Dense(run))
    dense_model = stage.model()
    dense_file = run.do(Exported(run, "dense"))
    known, weighing = _known(run, job, dense_model)
    masked_stage = Masked(run, dense_model, known)
    masked = run.do(masked_stage)
    model, folder, tuned = masked_stage.model(), masked_stage.folder, None
    if recipe.finetune.epochs and not job.source.synthetic:
        finetuned = Finetuned(run, dense_model, model)
        tuned = run.do(finetuned)
        model, folder = finetuned.model(), finetuned.folder
    deploy = run.do(Deploy(run, model, folder))

    compressed, proofs = _files(run, recipe, [row.precision for row in masked.facts.limited])
    files = [dense_file, *compressed]
    shipped = [done.facts.row.precision for done in compressed if done.facts.row.refused is None]
    engines, proofs = _engines(run, recipe, shipped, proofs)
    cells, duels = _timings(run, recipe, shipped, [done.facts for done in engines], proofs)
    untimed = not_measured(run, cells, [done.facts.row for done in files], [done.facts for done in engines])
    return Outcome(dense, weighing, masked, tuned, deploy, files, engines, [done for _, done in cells], duels, untimed)


def _files(run: Run, recipe: Recipe, limited: Collection[str]) -> tuple[list[Done[FileFacts]], Proofs]:
    """(the compressed model's files, fp32 first; what proves each of them, the dense file, and both models).

    Args:
        run: with both models and the dense file.
        recipe: of the run.
        limited: the precisions whose files the budget limits.

    Raises:
        ParityError: a file that the recipe requires is not the model, or no kind of int8 is.
    """
    root, files = run.root, [run.do(Exported(run, "compressed"))]
    proven = [rung for done in run.done.values() for rung in done.rungs]
    proofs = {root / name: proven for name in ("dense", "deploy")}
    proofs |= {onnx_path(root, FP32, which): proven for which in ("dense", "compressed")}
    precisions, left_open = expanded(recipe.export.precisions), ANY in recipe.budget.files
    for precision in (name for name in precisions if name != FP32):
        required = precisions[precision] and (not left_open or precision in limited)
        file = run.do(Converted(run, precision, required))
        files.append(file)
        if file.facts.row.refused is None:
            proofs[onnx_path(root, precision)] = [*proven, *file.rungs]
    int8 = [done.facts.row for done in files if done.facts.row.precision in int8_kinds()]
    if int8 and not left_open and all(row.refused is not None for row in int8):
        reasons = "; ".join(row.refused.removesuffix(".") for row in int8 if row.refused is not None)
        raise ParityError(f"no int8 file is the model: {reasons}.")
    return files, proofs


def _engines(
    run: Run, recipe: Recipe, shipped: Sequence[str], proofs: Proofs
) -> tuple[list[Done[EngineFacts]], Proofs]:
    """(the engines of the files in the `shipped` precisions, dense baselines first; the proofs, with those of the engines)."""
    section = recipe.engine
    if section is None:
        return [], proofs
    asked = [name for name in shipped if name in expanded(recipe.export.precisions)]
    compressed = [
        run.do(Engine(run, section, target, precision))
        for target, precision in product(section.targets, asked)
        if builds(target, precision)
    ]
    timed_on = {run.devices.get(name).runtime for name in (recipe.bench.targets if recipe.bench else ())}
    dense = [
        run.do(Engine(run, section, target, DENSE))
        for target in section.targets
        if target in timed_on and bench.times_engines(target)
    ]
    engines, proven = [*dense, *compressed], dict(proofs)
    for done in engines:
        source = onnx_path(run.root, done.facts.precision, done.facts.model)
        proven[run.root / done.facts.path] = [*proofs[source], *done.rungs]
    return engines, proven


def _timings(
    run: Run, recipe: Recipe, shipped: Sequence[str], engines: Iterable[EngineFacts], proofs: Proofs
) -> tuple[list[Cell], list[Done[BenchRow] | None]]:
    """(every comparison with the dense model, every duel of two kinds of int8)."""
    cells: list[Cell] = []
    duels: list[Done[BenchRow] | None] = []
    if recipe.bench is None:
        return cells, duels
    precisions = expanded(recipe.export.precisions)
    int8 = [name for name in int8_kinds() if name in precisions]
    built = {
        (each.target, DENSE if each.model == "dense" else each.precision): run.root / each.path for each in engines
    }
    for target, batch, threads in product(recipe.bench.targets, recipe.bench.batch, recipe.bench.threads):
        where = bench.Where(run.devices.get(target), batch, threads)
        planned = [
            bench.Bench(run, where, "bench", precision, pair, _claim(run, where.device, pair, proofs))
            for precision in shipped
            # int8 is held against fp32 as well, whether or not that is asked for
            if precision in precisions or int8
            if (pair := bench.pair(run, where, precision, built)) is not None
        ]
        cells += (timed := [(cell, bench.measured(run, cell)) for cell in planned])
        if len(rivals := bench.fastest_two(timed, int8)) > 1:
            duels.append(bench.measured(run, bench.duel(*rivals)))
    return cells, duels


def _known(run: Run, job: Job, dense: TimmModel) -> tuple[Known, Done[Nothing] | None]:
    """(what is measured of the dense model before it is compressed, the stage that weighs widths)."""
    sizes = [run.do(Rounded(run, dense, each.precision)).facts for each in job.problem.costs.files]
    files = sized(job, sizes)
    _ = job.problem.sized(files).options  # what no widths can meet is refused before they are weighed
    timers = clocks(job, dense, run.devices, run.progress)
    tables = [Table(run, timer) for timer in timers]
    for table in tables:
        run.do(table)
    weighed = Weighed(run, dense) if job.problem.method.weighs and job.problem.sites else None
    weighing = run.do(weighed) if weighed is not None else None
    return Known(timers, [table.table() for table in tables], files, weighed), weighing


def _claim(run: Run, device: Device, pair: tuple[Path, Path], proofs: Proofs) -> Parity:
    """What is proven of two files that are timed on a device: by the rungs that lead to them, and on this machine by its runtime."""
    rungs = [rung for path in pair for rung in proofs[path]]
    for stage in (Elsewhere(run, device.runtime, path) for path in pair if is_elsewhere(device, path)):
        rungs += (run.done.get(stage.name) or run.do(stage)).rungs
    return bench.claim(rungs)
