"""Writes `recipe.toml` into a run's folder, so that the run can be repeated."""

from __future__ import annotations

import logging
import os
import tomllib
from pathlib import Path

import tomlkit
from tomlkit.exceptions import ConvertError

from toolchain.errors import SlimvitError, StorageError
from toolchain.files import atomic_path, sha256, write_text
from toolchain.pipeline.folder import Workspace
from toolchain.places import absolute_path
from toolchain.recipe import RECIPE_FILE, Recipe, with_own_map
from toolchain.report.absent import PRIVATE
from toolchain.shell import word
from toolchain.version import tool

log = logging.getLogger(__name__)
OURS = "recipe.sha256"
"""Where a run keeps the digest of the recipe.toml that it wrote: any other was written by a person, and is not replaced."""
ORIGIN = "recipe.path"
"""Where a run keeps the path, from its folder, of the recipe that it carries out: folders of two projects can have one name."""


def leave_recipe(recipe: Recipe, space: Workspace) -> list[Path]:
    """`recipe.toml` below a run's folder, if it says what was carried out; else [].

    One that says so already stays as it is, with its comments, and so does one that a person wrote and that says something else.
    Relative paths were made absolute, so that it is the same recipe wherever it is read from; but a class map in the run's folder
    goes where the folder goes.

    Args:
        recipe: what was carried out.
        space: the run's folder.

    Raises:
        StorageError: it cannot be written.
    """
    path = space.root / RECIPE_FILE
    if path.exists():
        if says(path, recipe):
            return [path]
        if not is_ours(space):
            log.warning("%s is not the recipe that was carried out, and is left as it is; remove it to have that", path)
            return []
    text = _text(recipe, space.root)
    if text is None:
        path.unlink(missing_ok=True)
        return []
    write_text(path, text)
    claim(space)
    return [path]


def claim(space: Workspace) -> None:
    """Remembers that the run's recipe.toml, as it is now, was written by slimvit and by nobody else."""
    write_text(space.private / OURS, sha256(space.root / RECIPE_FILE))


def is_ours(space: Workspace) -> bool:
    """Whether the run's recipe.toml is to the byte what slimvit wrote there, so that it may be replaced."""
    path, ours = space.root / RECIPE_FILE, space.private / OURS
    return ours.is_file() and path.is_file() and ours.read_text(encoding="utf-8") == sha256(path)


def remember(origin: Path, space: Workspace) -> None:
    """Writes down which file the recipe is from that is carried out in a run's folder; raises StorageError.

    The folder's own recipe, which may be carried out there as well, takes no other's place.
    """
    place = absolute_path(str(origin), Path())
    if Path(place).parent == space.root.resolve() and (space.private / ORIGIN).is_file():
        return
    with atomic_path(space.private / ORIGIN) as temporary:
        temporary.write_bytes(os.fsencode(os.path.relpath(place, space.root.resolve())))


def require_own(origin: Path, folder: Path) -> None:
    """Raises StorageError if a folder that no --out named holds the run of another recipe than that of a file.

    A recipe that lies in the folder is its own: the run left it there. One that is gone, as in a checkout that was elsewhere, claims nothing.
    """
    remembered, root, place = folder / PRIVATE / ORIGIN, folder.resolve(), Path(absolute_path(str(origin), Path()))
    if not remembered.is_file() or place.parent == root:
        return
    other = absolute_path(os.fsdecode(remembered.read_bytes()), root)
    if other != str(place) and Path(other).is_file():
        raise StorageError(
            f"{folder} holds the run of another recipe, {other}: `slimvit run {word(origin)} --out DIR` takes a folder of its own, "
            f"and --out {word(folder)} goes on in that one"
        )


def _text(recipe: Recipe, folder: Path) -> str | None:
    """A recipe as TOML in a folder; None where something in it, of a recipe that was made in Python, has no words there."""
    try:
        body = tomlkit.dumps(with_own_map(recipe.tables(), folder))
        same = Recipe.from_dict(tomllib.loads(body), base=folder).to_json() == recipe.to_json()
    except (ConvertError, SlimvitError, ValueError):
        return None
    head = f"# What {tool()} carried out here; keys that are not there were at their defaults. docs/recipe.md says what they mean.\n"
    return f"{head}\n{body}" if same else None


def says(path: Path, recipe: Recipe) -> bool:
    """Whether a file is the same recipe, with the same paths."""
    try:
        return Recipe.load(path).to_json() == recipe.to_json()
    except SlimvitError:
        return False
