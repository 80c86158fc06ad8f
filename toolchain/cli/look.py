"""report, manifest, schema, init: they read, and change nothing but what is named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json, print_report
from toolchain.errors import ArtifactError, RecipeError, StorageError
from toolchain.files import read_json, sha256, write_text
from toolchain.gate import GateConfig, GateFile
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.report.assemble import SCHEMA as REPORT_SCHEMA
from toolchain.report.files import render

log = logging.getLogger(__name__)
SCHEMAS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "plan": CompressionPlan,
    "gate": GateConfig,
    "gate-result": GateFile,
}
TEMPLATE = """[model]
name = "deit_small_patch16_224"

[data]
source = "imagefolder:path/to/images"   # digits | fashion-mnist | imagefolder:PATH | images:PATH | hf:NAME | none

[compress]
method = "joint"                        # joint (no labels, no training) | hybrid | vtp | none

[budget]
params = 0.5                            # the share that is LEFT

[bench]
targets = ["ort-cpu"]
"""
manifest = typer.Typer(help="Check the files of a run against its manifest.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    for verb in (report, schema, init):
        app.command()(verb)
    manifest.command("verify")(manifest_verify)
    manifest.callback()(lambda: None)
    app.add_typer(manifest, name="manifest")


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], json_: JsonFlag = False
) -> None:
    """Print a run's report again, and rewrite report.md and report.html from report.json."""
    found = _read_report(folder)
    try:
        render(found, folder)
    except StorageError as error:  # an archive may be read-only; what was asked for is to see it
        log.warning("%s", error)
    print_json(found) if json_ else print_report(found, folder)


def _read_report(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "report.json")
    if not isinstance(found, dict) or found.get("schema") != REPORT_SCHEMA:
        raise ArtifactError(f"{folder / 'report.json'} is not a {REPORT_SCHEMA} report")
    return found


def manifest_verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], json_: JsonFlag = False
) -> None:
    """Whether every file of a run is the one that its manifest lists; exit 3 if not."""
    record = read_json(folder / "manifest.json")
    if not isinstance(record, dict) or not str(record.get("schema", "")).startswith("slimvit.manifest/"):
        raise ArtifactError(f"{folder / 'manifest.json'} is not a manifest that slimvit wrote")
    listed = record["files"]
    wrong = [
        entry["path"]
        for entry in listed
        if not (folder / entry["path"]).is_file() or sha256(folder / entry["path"]) != entry["sha256"]
    ]
    if json_:
        print_json({"files": len(listed), "wrong": wrong})
    if wrong:
        raise ArtifactError(f"{len(wrong)} of {len(listed)} files are missing or altered: {', '.join(wrong[:5])}")
    if not json_:
        line(f"{len(listed)} files, all as listed")


def schema(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(SCHEMAS)}.")],
    json_: JsonFlag = False,  # noqa: ARG001 - every verb takes it; here there is nothing else to print
) -> None:
    """Print a JSON schema."""
    if name not in SCHEMAS:
        raise RecipeError(f"unknown schema {name!r}; known: {', '.join(SCHEMAS)}")
    print_json(SCHEMAS[name].model_json_schema())


def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.toml"), json_: JsonFlag = False
) -> None:
    """Write a recipe to start from; an existing file is left alone."""
    if path.exists():
        raise StorageError(f"{path} exists; choose another name")
    write_text(path, TEMPLATE)
    print_json({"path": str(path)}) if json_ else line(f"wrote {path}")
