"""run, plan."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.options import (
    DryRunOption,
    JsonFlag,
    NoResumeOption,
    RecipeArgument,
    RunFolderOption,
    SetOption,
    SpeedupOption,
    design_of,
)
from toolchain.cli.screen import Screen, print_json, print_report, print_tables, print_wrapped
from toolchain.progress import Progress
from toolchain.report.tables import Table, number, size

if TYPE_CHECKING:
    from toolchain.compress.allocation import Allocation
    from toolchain.pipeline.preview import Preview
    from toolchain.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(run)
    app.command()(plan)


def run(
    context: typer.Context,
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: RunFolderOption = None,
    dry_run: DryRunOption = False,
    no_resume: NoResumeOption = False,
    require: SpeedupOption = None,
    json_: JsonFlag = False,
) -> None:
    """Carry out a recipe: load, compress, fine-tune, slice, split, export, build, measure, report."""
    from toolchain.export.precision import expanded
    from toolchain.measure.compare import compare
    from toolchain.pipeline.cell import require_speed
    from toolchain.pipeline.recipe_file import require_own
    from toolchain.pipeline.run import run as run_recipe
    from toolchain.recipe import Recipe

    loaded, folder = Recipe.load(recipe, set_ or ()), out or default_folder(recipe)
    if out is None:
        require_own(recipe, folder)
    if dry_run:
        show_plan(loaded, folder, json_=json_)
        return
    with Screen() as screen:
        timed = partial(compare, design=design_of(context))
        report = run_recipe(
            loaded, folder, resume=not no_resume, progress=Progress(screen), compare=timed, origin=recipe
        )
    if json_:
        print_json(report.to_dict())
    else:
        print_report(report, folder)
    require_speed(report, expanded(loaded.export.precisions), require)


def show_plan(recipe: Recipe, folder: Path, *, json_: bool) -> None:
    """Checks everything about a recipe and the folder of its run, and prints the plan; nothing is done."""
    from toolchain.pipeline.folder import Workspace
    from toolchain.pipeline.job import prepare
    from toolchain.pipeline.preview import from_shapes

    Workspace(folder.resolve()).check()
    _show(from_shapes(prepare(recipe, fetch=False)), json_=json_)


def default_folder(recipe: Path) -> Path:
    """models/m/recipe.toml → runs/m, models/m/recipe.vtp.toml → runs/m_vtp, models/m/other.toml → runs/m_other."""
    parts = [part for part in recipe.stem.split(".") if part and part != "recipe"]
    return Path("runs") / "_".join([recipe.resolve().parent.name, *parts])


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    shapes_only: Annotated[
        bool, typer.Option("--shapes-only", help="Read no weights and no images and measure nothing.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Print widths, ranks, predicted cost and damage of a recipe, and the range that its budget can be met in.

    Nothing is changed. Damage is measured on the recipe's weights and images, latency on this machine.
    """
    from toolchain.pipeline.preview import preview
    from toolchain.recipe import Recipe

    loaded = Recipe.load(recipe, set_ or ())
    with Screen() as screen:
        screen.stage("plan")
        shown = preview(loaded, measure=not shapes_only, progress=Progress(screen))
    _show(shown, json_=json_)


def _show(shown: Preview, *, json_: bool) -> None:
    if json_:
        print_json(shown.allocation.to_dict())
        return
    dense = shown.job.dense
    print_tables(_tables(dense.ref.name, shown.job.recipe.compress.method, shown.allocation))
    print_wrapped(f"restriction: {each}" for each in dense.family.restrictions(dense.module))
    print_wrapped([f"note: {shown.note}"] if shown.note else [])


def _tables(name: str, method: str, allocation: Allocation) -> list[Table]:
    from toolchain.cost import RANK
    from toolchain.report.front import front_table

    dense, left, least = allocation.problem.shape, allocation.predicted, allocation.smallest
    cost: list[tuple[str, ...]] = [
        (what, show(whole), show(part), f"{part / whole:.4f}", f"{narrowest / whole:.3f} … 1")
        for what, show, whole, part, narrowest in (
            ("params", number, dense.params, left.params, least.params),
            ("macs", number, dense.macs, left.macs, least.macs),
            ("bytes", size, dense.size_bytes, left.size_bytes, least.size_bytes),
        )
    ]
    for file in allocation.files:
        share, (low, high) = file.predicted / dense.size_bytes, (each / dense.size_bytes for each in file.reachable)
        sizes = (size(dense.size_bytes), size(file.predicted))
        own = "" if file.requested is not None else ", not limited"
        cost.append((f"{file.precision} file{own}", *sizes, f"{share:.4f}", f"{low:.3f} … {high:.3f}"))
    for row in allocation.latency:
        times = [f"{share * row.dense_ms:.3f} ms" for share in (1.0, row.predicted)]
        where = f"{row.target}, batch {row.batch}, {row.threads} thread(s)"
        cost.append((where, *times, f"{row.predicted:.4f}", f"{row.reachable[0]:.3f} … 1"))
        if row.measured is not None:
            missed = "" if row.met else f"missed: {row.requested:.3f} was asked for"
            time = f"{row.measured * row.dense_ms:.3f} ms"
            cost.append(("  measured, these shapes", times[0], time, f"{row.measured:.4f}", missed))
    damage, widths = allocation.damage, allocation.widths
    chosen = [*widths.kept.items(), *(((linear, RANK), rank) for linear, rank in widths.ranks.items())]
    rows = [(*key, str(count), f"{damage[key]:.3g}" if key in damage else "") for key, count in chosen]
    if damage:
        rows.append(("sum of these, each measured alone", "", "", f"{sum(damage.values()):.3g}"))
    predicted = Table(f"{name}: {method}, predicted", ("", "dense", "compressed", "left", "reachable"), tuple(cost))
    header = ("module", "unit", "kept", "damage (nats per image)")
    count = len(header) if damage else len(header) - 1
    kept = Table("Kept per layer", header[:count], tuple(row[:count] for row in rows), text=(0, 1))
    others = front_table(allocation.front)
    return [predicted, *([kept] if rows else []), *([others] if others.rows else [])]
