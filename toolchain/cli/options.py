"""Options that several verbs share."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

STDOUT = "-"
"""What --json stands for where it takes a file and is given none."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. budget.params=0.4.")
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.toml.")]
RecipeOption = Annotated[Path, typer.Option("--recipe", metavar="RECIPE", help="A recipe.toml.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder that a stage before wrote.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write.")]
TargetsOption = Annotated[
    Path | None,
    typer.Option(
        "--targets", metavar="FILE", help="targets.toml; if absent, that of this folder and the user's are read."
    ),
]


def with_lone_json(args: list[str]) -> list[str]:
    """The same arguments, with `STDOUT` after a --json that stands alone: typer's options cannot do either.

    Only what ends in .json is taken for its file, so that no artifact that follows is written over.
    """
    given: list[str] = []
    for part, following in zip_longest(args, args[1:], fillvalue="--"):
        given.append(part)
        if part == "--json" and following != STDOUT and not (following.endswith(".json") and following[0] != "-"):
            given.append(STDOUT)
    return given
