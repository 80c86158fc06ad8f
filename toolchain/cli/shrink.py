"""shrink: everything that a recipe does, in one line, and the recipe beside the result."""

from __future__ import annotations

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.init import DataOption, ModelArgument, NameOption, write_recipe
from toolchain.cli.options import DryRunOption, JsonFlag, NoResumeOption, SetOption, SpeedupOption, design_of
from toolchain.cli.pipeline import show_plan
from toolchain.cli.screen import Screen, line, print_json, print_report
from toolchain.defaults import PARAMS
from toolchain.errors import StorageError
from toolchain.progress import Progress

if TYPE_CHECKING:
    from toolchain.pipeline.draft import Draft
    from toolchain.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(shrink)


def shrink(
    context: typer.Context,
    model: ModelArgument,
    data: DataOption,
    name: NameOption = "",
    params: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help=f"Share of the parameters LEFT; {PARAMS} without any budget.")
    ] = None,
    macs: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of the MACs LEFT.")] = None,
    size: Annotated[
        str, typer.Option(help="Of the fp32 weights: '45%' or '12 MB'; of a file: 'int4=3 MB', or 'any=3 MB'.")
    ] = "",
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run; runs/NAME if absent.")] = None,
    dry_run: DryRunOption = False,
    no_resume: NoResumeOption = False,
    require: SpeedupOption = None,
    json_: JsonFlag = False,
) -> None:
    """Make a model smaller: compress, export, compare and time it as `run` does, without a recipe; one is written."""
    from toolchain.export.precision import expanded
    from toolchain.measure.compare import compare
    from toolchain.pipeline.cell import require_speed
    from toolchain.pipeline.draft import Draft
    from toolchain.pipeline.run import run as run_recipe

    precision, named, text = size.rpartition("=")
    limit = {precision.strip(): text.strip()} if named else size
    wishes = {"params": params, "macs": macs, "size": limit or None}
    budget = {key: value for key, value in wishes.items() if value is not None}
    folder = out or Path("runs") / _folder_name(model)
    drafted = partial(Draft.of, model, data, budget, name=name, overrides=set_ or ())
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:  # a class map lies beside its recipe
            draft = drafted(beside=Path(scratch))
            write_recipe(draft, Path(scratch, "recipe.toml"))
            show_plan(draft.recipe, json_=json_)
        return
    draft = drafted(beside=folder)
    recipe = _written(draft, folder / "recipe.toml")
    with Screen() as screen:
        timed = partial(compare, design=design_of(context))
        report = run_recipe(recipe, folder, resume=not no_resume, progress=Progress(screen), compare=timed)
    if json_:
        print_json(report.to_dict())
    else:
        print_report(report, folder)
        path = folder / "recipe.toml"
        line(f"Recipe: {path}; change it and carry it out with: slimvit run {path} --out {folder}")
    require_speed(report, expanded(recipe.export.precisions), require)


def _written(draft: Draft, path: Path) -> Recipe:
    """The recipe of a draft, once it lies at the path.

    Raises:
        StorageError: another recipe lies there, and a person wrote it or it was carried out.
    """
    from toolchain.pipeline.folder import Workspace
    from toolchain.pipeline.recipe_file import claim, is_ours, says

    space = Workspace(path.parent)
    if path.exists() and not says(path, draft.recipe):
        if space.has("") or not is_ours(space):
            raise StorageError(
                f"{path} says something else than this command: choose another --out, or carry that recipe out with "
                f"`slimvit run {path} --out {path.parent}`"
            )
        path.unlink()
    written = not path.exists()
    write_recipe(draft, path)
    if written:
        claim(space)
    return draft.recipe


def _folder_name(model: str) -> str:
    """What a run is called for a model: the last part of its name or path."""
    last = Path(model.partition("@")[0].rpartition(":")[2]).expanduser().resolve()
    return re.sub(r"[^\w.-]+", "_", last.stem if last.is_file() else last.name)
