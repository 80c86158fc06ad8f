"""manifest verify: whether a run's files are those that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json
from toolchain.errors import ArtifactError
from toolchain.files import read_json, sha256

manifest = typer.Typer(help="Check the files of a run against its manifest.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    manifest.command("verify")(verify)
    manifest.callback()(lambda: None)
    app.add_typer(manifest, name="manifest")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], json_: JsonFlag = False
) -> None:
    """Whether every file of a run is the one that its manifest lists; exit 3 if not."""
    record = read_json(folder / "manifest.json")
    if not isinstance(record, dict) or not str(record.get("schema", "")).startswith("slimvit.manifest/"):
        raise ArtifactError(f"{folder / 'manifest.json'} is not a manifest that slimvit wrote")
    try:
        listed = {str(entry["path"]): entry["sha256"] for entry in record["files"]}
    except (KeyError, TypeError):
        raise ArtifactError(f"{folder / 'manifest.json'} lists no files with their digests; it is damaged") from None
    wrong = [
        name for name, digest in listed.items() if not (folder / name).is_file() or sha256(folder / name) != digest
    ]
    if json_:
        print_json({"files": len(listed), "wrong": wrong})
    if wrong:
        raise ArtifactError(f"{len(wrong)} of {len(listed)} files are missing or altered: {', '.join(wrong[:5])}")
    if not json_:
        line(f"{len(listed)} files, all as listed")
