"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
