"""schema: the JSON schemas of the files that slimvit reads and writes."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Annotated, Any

import typer

from toolchain.cli.completion import one_of
from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import print_json
from toolchain.errors import RecipeError

SCHEMAS = {
    "recipe": "toolchain.recipe:Recipe",
    "plan": "toolchain.plan:CompressionPlan",
    "report": "toolchain.report.record:Report",
    "gate": "toolchain.gate:GateConfig",
    "gate-result": "toolchain.gate:GateFile",
}
"""Name → where the model is that says what the file may hold."""


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(schema)


def schema(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(SCHEMAS)}.", autocompletion=one_of(*SCHEMAS))],
    json_: JsonFlag = False,  # noqa: ARG001 - every verb takes it; here there is nothing else to print
) -> None:
    """Print a JSON schema."""
    if name not in SCHEMAS:
        raise RecipeError(f"unknown schema {name!r}; known: {', '.join(SCHEMAS)}")
    print_json(schema_of(name))


def schema_of(name: str) -> dict[str, object]:
    """The JSON schema of one of `SCHEMAS`; that of a recipe names what is registered."""
    document: dict[str, Any] = resolve_name(SCHEMAS[name]).model_json_schema()
    if name == "recipe":
        for section, keys in _names().items():
            for key, known in keys.items():
                described = document["$defs"][section]["properties"][key]
                described.get("items", described)["enum"] = known
    return document


def _names() -> dict[str, dict[str, list[str]]]:
    """Section → key → the names that it takes, those of installed packages among them; "" leaves the choice to the method."""
    from toolchain.artifacts.onnx_file import FP32
    from toolchain.compress.criteria import CRITERIA
    from toolchain.compress.factorisations import FACTORISATIONS
    from toolchain.compress.method import NONE
    from toolchain.compress.solver import ALLOCATIONS
    from toolchain.export.precision import EITHER
    from toolchain.export.precisions import PRECISIONS
    from toolchain.targets import TARGETS

    return {
        "CompressSection": {
            "attention": ["", NONE, *FACTORISATIONS],
            "neurons": ["", NONE, *CRITERIA],
            "allocation": ["", *ALLOCATIONS],
        },
        "ExportSection": {"precisions": [FP32, EITHER, *PRECISIONS]},
        "EngineSection": {"targets": [name for name, target in TARGETS.items() if target.builds]},
    }
