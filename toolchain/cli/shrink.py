"""shrink: everything that a recipe does, in one line, and the recipe beside the result."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.init import DataOption, ModelArgument, NameOption, require_named, write_recipe
from toolchain.cli.options import (
    DryRunOption,
    JsonFlag,
    NoResumeOption,
    RunFolderOption,
    SetOption,
    SpeedupOption,
    design_of,
)
from toolchain.cli.pipeline import show_plan
from toolchain.cli.screen import Screen, line, print_json, print_report
from toolchain.defaults import PARAMS
from toolchain.errors import FolderBusy, RecipeError, SlimvitError, StorageError
from toolchain.files import expanded
from toolchain.progress import Progress
from toolchain.shell import word

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
        str, typer.Option(metavar="SHARE", help=f"Of the parameters, what is LEFT; {PARAMS} without any budget.")
    ] = "",
    macs: Annotated[str, typer.Option(metavar="SHARE", help="Of the MACs, what is LEFT: 0.5 or 50%.")] = "",
    size: Annotated[
        str, typer.Option(help="Of the fp32 weights: '45%' or '12 MB'; of a file: 'int4=3 MB', or 'any=3 MB'.")
    ] = "",
    set_: SetOption = None,
    out: RunFolderOption = None,
    dry_run: DryRunOption = False,
    no_resume: NoResumeOption = False,
    require: SpeedupOption = None,
    json_: JsonFlag = False,
) -> None:
    """Make a model smaller: compress, export, compare and time it as `run` does, without a recipe; one is written."""
    budget = _budget(params, macs, size)
    folder = out or Path("runs") / _folder_name(model)
    _require(model, data, budget, set_ or [], folder)
    from toolchain.export.precision import expanded
    from toolchain.measure.compare import compare
    from toolchain.pipeline.cell import require_speed
    from toolchain.pipeline.draft import Draft
    from toolchain.pipeline.run import run as run_recipe

    drafted = partial(Draft.of, model, data, budget, name=name, overrides=set_ or ())
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:  # a class map lies beside its recipe
            draft = drafted(beside=Path(scratch))
            write_recipe(draft, Path(scratch, "recipe.toml"))
            _require_same(_recipe_in(folder, draft), folder / "recipe.toml")
            show_plan(draft.recipe, folder, json_=json_)
        return
    draft = drafted(beside=folder)
    with _withdrawn_on_failure(folder), Screen() as screen:
        recipe = _written(draft, folder / "recipe.toml")
        timed = partial(compare, design=design_of(context))
        report = run_recipe(
            recipe,
            folder,
            resume=not no_resume,
            progress=Progress(screen),
            compare=timed,
            origin=folder / "recipe.toml",
        )
    if json_:
        print_json(report.to_dict())
    else:
        print_report(report, folder)
        line(f"Recipe: {folder / 'recipe.toml'}; change it and carry it out with: {_again(folder / 'recipe.toml')}")
    require_speed(report, expanded(recipe.export.precisions), require)


def _budget(params: str, macs: str, size: str) -> dict[str, object]:
    """The keys of [budget] that were given; raises RecipeError where a share is none."""
    from toolchain.settings import share_of

    budget: dict[str, object] = {}
    for key, text in (("params", params), ("macs", macs)):
        try:
            budget |= {key: share_of(text)} if text else {}
        except ValueError as error:
            raise RecipeError(f"--{key} {error}") from None
    precision, named, text = size.rpartition("=")
    return budget | ({"size": {precision.strip(): text.strip()} if named else size} if size else {})


def _require(model: str, data: str, budget: dict[str, object], overrides: list[str], folder: Path) -> None:
    """Refuses what can be refused before the work, and what it needs, is imported, which takes seconds."""
    from toolchain.pipeline.named import require_run_folder
    from toolchain.recipe import Recipe, override

    require_named(model, data)
    require_run_folder(folder)
    for key in budget:
        if twice := [each for each in overrides if each.strip().startswith((f"budget.{key}=", f"budget.{key}."))]:
            raise RecipeError(f"--{key} and --set {twice[0]} limit the same: leave one of them out")
    tables: dict[str, object] = {"model": {"name": model}, "budget": dict(budget)}
    for each in overrides:
        override(tables, each)
    Recipe.from_dict(tables)


def _recipe_in(folder: Path, draft: Draft) -> Recipe:
    """The recipe of a draft as it would be in another folder, beside its class map."""
    from toolchain.pipeline.draft import CLASSES_FILE
    from toolchain.recipe import Recipe

    classes = {"classes": str(folder / CLASSES_FILE)} if draft.classes else {}
    return Recipe.from_dict({**draft.tables, "data": {**draft.tables["data"], **classes}})


def _require_same(recipe: Recipe, path: Path) -> None:
    """Raises StorageError if another recipe lies at the path, and a person wrote it or it was carried out."""
    from toolchain.pipeline.folder import Workspace
    from toolchain.pipeline.recipe_file import is_ours, says

    space = Workspace(path.parent)
    if path.exists() and not says(path, recipe) and (space.has("") or not is_ours(space)):
        raise StorageError(
            f"{path} says something else than this command: choose another --out, or carry that recipe out with "
            f"`{_again(path)}`"
        )


def _written(draft: Draft, path: Path) -> Recipe:
    """The recipe of a draft, once it lies at the path.

    Raises:
        StorageError: another recipe lies there, and a person wrote it or it was carried out.
        FolderBusy: another run is at the folder; it may not have finished a stage, and goes on by the recipe that lies there.
    """
    from toolchain.pipeline.folder import Workspace
    from toolchain.pipeline.recipe_file import claim, says

    Workspace(path.parent.resolve()).check()
    _require_same(draft.recipe, path)
    if path.exists() and not says(path, draft.recipe):
        path.unlink()
    written = not path.exists()
    write_recipe(draft, path)
    if written:
        claim(Workspace(path.parent))
    return draft.recipe


@contextmanager
def _withdrawn_on_failure(folder: Path) -> Iterator[None]:
    """Takes a draft's new files away again if an error ends the work before its first stage: the next try owes them nothing."""
    from toolchain.pipeline.draft import CLASSES_FILE, SCHEMA_FILE
    from toolchain.pipeline.folder import Workspace
    from toolchain.pipeline.recipe_file import ORIGIN, OURS

    space = Workspace(folder)
    files = [*(folder / name for name in ("recipe.toml", CLASSES_FILE, SCHEMA_FILE))]
    files += [space.private / name for name in (OURS, ORIGIN)]
    new = [file for file in files if not file.exists()]
    try:
        yield
    except FolderBusy:
        raise
    except SlimvitError:
        if not space.has(""):
            for file in new:
                file.unlink(missing_ok=True)
            for emptied in (space.private, folder):
                with suppress(OSError):  # something else lies there
                    emptied.rmdir()
        raise


def _again(recipe: Path) -> str:
    """The command that carries out a recipe in its own folder, as a shell reads it."""
    return f"slimvit run {word(recipe)} --out {word(recipe.parent)}"


def _folder_name(model: str) -> str:
    """What a run is called for a model: the last part of its name or path."""
    last = expanded(model.partition("@")[0].rpartition(":")[2]).resolve()
    return re.sub(r"[^\w.-]+", "_", last.stem if last.is_file() else last.name)
