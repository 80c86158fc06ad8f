"""What a shell offers as the value of an option; what knows it is imported when it is asked for, and not before.

Where nothing is offered, shells offer files.
"""

from __future__ import annotations

import contextlib
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
    from toolchain.recipe import CLASS_LISTS

    return [*CLASS_LISTS]


def models(incomplete: str) -> list[str]:
    """Names of timm, once one was begun that no file here begins with: they are many, and listing them takes seconds."""
    is_path = "/" in incomplete or any(path.name.startswith(incomplete) for path in Path().iterdir())
    if is_path or not incomplete[:1].isalnum():
        return []
    from toolchain.surgery.support import timm_names

    return timm_names(f"{incomplete}*")
