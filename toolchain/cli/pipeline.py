"""run, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from toolchain.bench.cell import require_speedup
from toolchain.cli.options import JsonFlag, RecipeArgument, SetOption
from toolchain.cli.screen import Screen, line, print_json, print_report, print_tables
from toolchain.compress.method import Allocation
from toolchain.job import Job, prepare
from toolchain.pipeline import run as run_recipe
from toolchain.recipe import Recipe
from toolchain.report.tables import Table, number, size


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(run)
    app.command()(plan)


def run(
    recipe: RecipeArgument,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; runs/NAME if absent.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; do no work.")
    ] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Do every stage anew.")] = False,
    require: Annotated[
        float | None, typer.Option("--require-speedup", min=0.0, help="Exit 4 unless this speedup is verified.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Carry out a recipe: load, compress, fine-tune, slice, split, export, build, measure, report."""
    loaded = Recipe.load(recipe, set_ or ())
    if dry_run:
        _show(prepare(loaded, fetch=False), json_=json_)
        return
    folder = out or default_folder(recipe)
    with Screen() as screen:
        report = run_recipe(loaded, folder, resume=not no_resume, listener=screen)
    if json_:
        print_json(report)
    else:
        print_report(report, folder)
    if require is not None:
        require_speedup(report, require)


def default_folder(recipe: Path) -> Path:
    """models/m/recipe.toml → runs/m, models/m/recipe.vtp.toml → runs/m_vtp, models/m/other.toml → runs/m_other."""
    parts = [part for part in recipe.stem.split(".") if part and part != "recipe"]
    return Path("runs") / "_".join([recipe.resolve().parent.name, *parts])


def plan(recipe: RecipeArgument, set_: SetOption = None, json_: JsonFlag = False) -> None:
    """Print widths, ranks and predicted cost of a recipe; no weight and no image is read."""
    _show(prepare(Recipe.load(recipe, set_ or ()), shapes_only=True), json_=json_)


def _show(job: Job, *, json_: bool) -> None:
    if json_:
        print_json(job.allocation.to_dict())
        return
    print_tables(_tables(job))
    for limit in job.dense.family.limits(job.dense.module):
        line(f"limit: {limit}")
    if job.allocation.learned:
        line("Widths are learned: a global threshold moves them between layers; their total stays within the budget.")


def _tables(job: Job) -> list[Table]:
    allocation: Allocation = job.allocation
    record: dict[str, Any] = allocation.to_dict()
    show = {"params": number, "macs": number, "bytes": size}
    cost = tuple(
        (
            name,
            show[name](record["dense"][name]),
            show[name](record["predicted"][name]),
            f"{record['ratio'][name]:.4f}",
            f"{record['reachable'][name][0]:.3f} … 1",
        )
        for name in show
    )
    widths = tuple((row["module"], row["unit"], str(row["kept"])) for row in record["widths"])
    ranks = tuple((row["linear"], "rank", str(row["rank"])) for row in record["ranks"])
    title = f"{job.dense.ref.name}: {job.recipe.compress.method}"
    predicted = Table(f"{title}, predicted", ("", "dense", "compressed", "left", "reachable"), cost)
    chosen = Table("Kept per layer", ("module", "unit", "kept"), (*widths, *ranks), text=(0, 1))
    return [predicted, *([chosen] if chosen.rows else [])]
