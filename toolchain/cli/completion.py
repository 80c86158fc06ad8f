"""What a shell offers as the value of an option; what knows it is imported when it is asked for, and not before.

Where nothing is offered, shells offer files.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable
from pathlib import Path

import typer

from toolchain.errors import SlimvitError

GATE = Path("gate.toml")
"""What the gate reads unless another file is named."""


def one_of(*words: str) -> Callable[[], list[str]]:
    """Offers these words."""
    return lambda: [*words]


def targets(context: typer.Context) -> list[str]:
    """The targets of this machine, and those of the targets.toml that the command reads."""
    from toolchain.devices.targets_toml import load_targets
    from toolchain.targets import TARGETS

    file = context.params.get("targets")
    names = [*TARGETS]
    with contextlib.suppress(SlimvitError):  # the command will say what is wrong with the file
        names += load_targets(Path(file) if file else None)
    return names


def builders() -> list[str]:
    """The targets that build engines."""
    from toolchain.targets import TARGETS

    return [name for name, target in TARGETS.items() if target.builds]


def refitters() -> list[str]:
    """The targets that put weights into an engine that was built without them."""
    from toolchain.targets import TARGETS, Refittable

    return [name for name, target in TARGETS.items() if isinstance(target, Refittable)]


def precisions() -> list[str]:
    """The precisions of a file."""
    from toolchain.export.precisions import PRECISIONS

    return ["fp32", *PRECISIONS]


def class_lists() -> list[str]:
    """The class lists that have a name."""
    from toolchain.places import CLASS_LISTS

    return [*CLASS_LISTS]


def models(incomplete: str) -> list[str]:
    """Names of timm; they are many."""
    if _may_be_a_path(incomplete):
        return []
    from toolchain.surgery.support import timm_names

    return timm_names(f"{incomplete}*")


def sources(incomplete: str) -> list[str]:
    """The data sources that are a word alone."""
    if _may_be_a_path(incomplete):
        return []
    from toolchain.data import SOURCES

    return [name for name, kind in SOURCES.items() if not kind.usage.startswith(f"{name}:")]


def settings(incomplete: str) -> list[str]:
    """Keys of a recipe, each with its "=", and behind one the words that it may be, where these are known beforehand."""
    from toolchain.recipe import PRESETS, Recipe
    from toolchain.settings import keys_of, words_of

    keys = keys_of(Recipe)
    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{name}=" for name in keys]
    if key == "data.source":
        words = sources(value)
    elif key == "model.name":
        words = models(value)
    else:
        words = [*PRESETS] if key == "compress.method" else words_of(keys[key]) if key in keys else []
    return [f"{key}={word}" for word in words]


def cells(context: typer.Context) -> list[str]:
    """The cells of the gate.toml that the command reads."""
    from toolchain.settings import read_toml

    tables: object = ()
    with contextlib.suppress(SlimvitError):
        tables = read_toml(Path(context.params.get("config") or GATE)).get("cell")
    return [str(each["name"]) for each in tables if "name" in each] if isinstance(tables, list) else []


def _may_be_a_path(incomplete: str) -> bool:
    """Whether files are what is asked for: listing names takes seconds, so these are offered once one was begun that no file has."""
    return not incomplete[:1].isalnum() or "/" in incomplete or any(Path().glob(f"{glob.escape(incomplete)}*"))
