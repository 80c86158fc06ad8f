"""models: which timm models are supported, and why the others are not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from toolchain.cli import completion
from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json, print_tables
from toolchain.errors import RecipeError
from toolchain.report.tables import Table, number


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(models)


def models(
    pattern: Annotated[
        str, typer.Argument(help="Wildcard over timm's names, e.g. 'deit*'.", autocompletion=completion.models)
    ] = "*",
    json_: JsonFlag = False,
) -> None:
    """Which timm models are supported: full, partial (with the limit), or refused (with the reason)."""
    from toolchain.surgery.support import near_names, supports, timm_names

    rows = supports(timm_names(pattern))
    if not rows:
        raise RecipeError(f"no timm model matches {pattern!r}; {near_names(pattern)}")
    if json_:
        print_json([asdict(row) for row in rows])
        return
    shown = [row for row in rows if row.params is not None] or rows
    cells = tuple((row.name, row.support, number(row.params), row.reason) for row in shown)
    print_tables([Table("timm models", ("name", "support", "parameters", "reason"), cells, text=(0, 1, 3))])
    if len(shown) < len(rows):
        line(f"{len(rows) - len(shown)} more belong to no supported family; --json lists them.")
