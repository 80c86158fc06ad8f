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


def _may_be_a_path(incomplete: str) -> bool:
    """Whether files are what is asked for: listing names takes seconds, so these are offered once one was begun that no file has."""
    return not incomplete[:1].isalnum() or "/" in incomplete or any(Path().glob(f"{glob.escape(incomplete)}*"))
