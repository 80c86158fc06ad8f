"""sweep: a recipe in several variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli import completion
from toolchain.cli.options import JsonFlag, OutOption, RecipeArgument, design_of
from toolchain.cli.screen import Screen, line, print_json, print_part
from toolchain.errors import RecipeError, SlimvitError, TargetUnavailable
from toolchain.files import read_json
from toolchain.progress import Progress

if TYPE_CHECKING:
    from toolchain.pipeline.sweep import Variant
    from toolchain.report.record import Report


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(sweep)


def sweep(
    context: typer.Context,
    recipe: RecipeArgument,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=V1,V2",
            help="Values of a recipe key, e.g. budget.params=0.7,0.5.",
            autocompletion=completion.settings,
        ),
    ],
    out: OutOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every variant and list them; do no work.")] = False,
    dask: Annotated[
        str,
        typer.Option(
            "--dask", metavar="ADDRESS", help="Of a Dask scheduler, as tcp://HOST:8786, whose workers do the work."
        ),
    ] = "",
    json_: JsonFlag = False,
) -> None:
    """Run a recipe in several variants, which share what they have in common, and set them side by side.

    The same command resumes a sweep. Started twice, two processes share the work.
    """
    from toolchain.measure.compare import compare
    from toolchain.pipeline.run import run
    from toolchain.pipeline.sweep import gathered, require_writable, variants
    from toolchain.pipeline.sweep import sweep as sweep_grid
    from toolchain.report.several import side_by_side

    if dry_run and dask:
        raise RecipeError("--dry-run checks the variants on this machine: leave --dask out")
    grid = variants(recipe, set_)
    require_writable(grid, out)
    if dry_run:
        _check(grid, json_=json_)
        return
    with Screen() as screen:
        timed = partial(compare, design=design_of(context))

        said = set[str]()

        def carry_out(variant: Variant, folder: Path, folders: Sequence[Path]) -> Report:
            if variant.name not in said:  # one that another process is at is asked again and again
                screen.say(variant.name)
                said.add(variant.name)
            return run(variant.recipe, folder, progress=Progress(screen), compare=timed, others=folders)

        if dask:
            from toolchain.pipeline.sweep_dask import on_dask

            outcome = gathered(grid, out, on_dask(grid, out, dask, design_of(context), screen.say))
        else:
            outcome = sweep_grid(grid, out, carry_out)
    if json_:
        print_json(read_json(out / "sweep.json"))
    elif outcome.reports:
        failed = {name: str(error) for name, error in outcome.failed.items()}
        print_part(side_by_side(outcome.reports, failed))
        line(f"{out / 'sweep.html'}  (also sweep.md, sweep.json)")
    _raise_first(outcome.failed, len(grid))


def _check(grid: Sequence[Variant], *, json_: bool) -> None:
    """Prints every variant, with what stands in its way; raises the first of these errors."""
    from toolchain.pipeline.job import prepare

    failed = dict[str, SlimvitError]()
    for variant in grid:
        try:
            prepare(variant.recipe, fetch=False)
        except SlimvitError as error:
            failed[variant.name] = error
        if not json_:
            line(f"{variant.name}: {failed[variant.name]}" if variant.name in failed else variant.name)
    if json_:
        errors = {name: str(error) for name, error in failed.items()}
        print_json([{"name": variant.name, "error": errors.get(variant.name)} for variant in grid])
    _raise_first(failed, len(grid))


def _raise_first(failed: Mapping[str, SlimvitError], count: int) -> None:
    """Raises the first error, of the kind that it has, with the names of all variants that failed."""
    for name, error in failed.items():
        if isinstance(error, TargetUnavailable):
            raise error
        raise type(error)(f"{len(failed)} of {count} variants failed ({', '.join(failed)}); {name}: {error}")
