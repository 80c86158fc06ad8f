"""schema: the JSON schemas of the files that slimvit reads and writes."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import print_json
from toolchain.errors import RecipeError
from toolchain.gate import GateConfig, GateFile
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.report.record import Report

SCHEMAS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "plan": CompressionPlan,
    "report": Report,
    "gate": GateConfig,
    "gate-result": GateFile,
}


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(schema)


def schema(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(SCHEMAS)}.")],
    json_: JsonFlag = False,  # noqa: ARG001 - every verb takes it; here there is nothing else to print
) -> None:
    """Print a JSON schema."""
    if name not in SCHEMAS:
        raise RecipeError(f"unknown schema {name!r}; known: {', '.join(SCHEMAS)}")
    print_json(SCHEMAS[name].model_json_schema())
