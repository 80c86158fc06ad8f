"""manifest verify, manifest sbom: whether a run's files are those that it wrote, and a bill of materials of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli import outputs
from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json
from toolchain.files import write_text

manifest = typer.Typer(
    help="Check the files of a run against its manifest, and list them for others.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    manifest.command("verify")(verify)
    manifest.command("sbom")(sbom)
    app.add_typer(manifest, name="manifest")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], json_: JsonFlag = False
) -> None:
    """Whether every file of a run is the one that its manifest lists; exit 3 if not."""
    from toolchain.publish.manifest import Manifest

    record = Manifest.load(folder)
    if json_:
        print_json({"files": len(record.files), "wrong": record.wrong(folder)})
    record.require(folder)
    if not json_:
        line(f"{len(record.files)} files, all as listed")


def sbom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")],
    out: Annotated[
        Path | None,
        outputs.option("Write it there, and not to stdout.", outputs.BILL),
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Write a bill of materials in CycloneDX's form: the model, its files with SHA-256, and the packages that wrote them."""
    from toolchain.publish.sbom import sbom as bill_of

    text = bill_of(folder)
    if out is None:
        line(text.rstrip("\n"))
    else:
        write_text(out, text)
        print_json({"path": str(out)}) if json_ else line(f"wrote {out}")
