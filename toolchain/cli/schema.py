"""schema: the JSON schemas of the files that slimvit reads and writes."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel

from toolchain.artifacts.onnx_file import FP32
from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import print_json
from toolchain.compress.criteria import CRITERIA
from toolchain.compress.factorisations import FACTORISATIONS
from toolchain.compress.method import NONE
from toolchain.compress.solver import ALLOCATIONS
from toolchain.errors import RecipeError
from toolchain.export.precision import EITHER, PRECISIONS
from toolchain.gate import GateConfig, GateFile
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.report.record import Report
from toolchain.targets import TARGETS

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
    print_json(schema_of(name))


def schema_of(name: str) -> dict[str, object]:
    """The JSON schema of one of `SCHEMAS`; that of a recipe names what is registered."""
    document = SCHEMAS[name].model_json_schema()
    if name == "recipe":
        for section, keys in _names().items():
            for key, known in keys.items():
                described = document["$defs"][section]["properties"][key]
                described.get("items", described)["enum"] = known
    return document


def _names() -> dict[str, dict[str, list[str]]]:
    """Section → key → the names that it takes, those of installed packages among them; "" leaves the choice to the method."""
    return {
        "CompressSection": {
            "attention": ["", NONE, *FACTORISATIONS],
            "neurons": ["", NONE, *CRITERIA],
            "allocation": ["", *ALLOCATIONS],
        },
        "ExportSection": {"precisions": [FP32, EITHER, *PRECISIONS]},
        "EngineSection": {"targets": [name for name, target in TARGETS.items() if target.builds]},
    }
