"""push: a run's files as a repository of a hub, with a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json, print_tables
from toolchain.errors import RecipeError
from toolchain.files import expanded
from toolchain.report.tables import Table, size
from toolchain.version import tool

if TYPE_CHECKING:
    from toolchain.publish.push import Destination


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(push)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")],
    to: Annotated[
        str, typer.Argument(metavar="TO", help="hf://ORG/NAME, perhaps with @BRANCH, or local-dir:PATH for a folder.")
    ],
    revision: Annotated[
        str, typer.Option(metavar="BRANCH", help="The branch, made if it is not there; main if absent.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Names of the classes: one a line, a JSON list, or a config.json with id2label."
        ),
    ] = None,
    license_: Annotated[
        str, typer.Option("--license", metavar="ID", help="Of the weights, as hubs spell it: apache-2.0, mit, …")
    ] = "",
    base: Annotated[
        str,
        typer.Option(metavar="ORG/NAME", help="The repository of the dense weights, where the run does not know it."),
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that slimvit did not write, or that were changed since.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files, and write nothing; no hub is asked.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Write a run's ONNX files to a hub, as transformers.js finds them, with a card."""
    from toolchain.places import HUB, HUB_URL, LOCAL, model_source
    from toolchain.publish.folder import FolderDestination
    from toolchain.publish.hub import MAIN, HubDestination, branch_of
    from toolchain.publish.push import RECEIPT, before
    from toolchain.publish.push import push as push_files
    from toolchain.publish.repository import read_labels, repository

    kind, place = model_source(to)
    if kind not in (HUB, LOCAL) or not place:
        raise RecipeError(f"{to!r} is no place to push to: write {HUB_URL}ORG/NAME, or {LOCAL}:PATH for a folder")
    if kind == LOCAL and (private or revision):
        raise RecipeError("--private and --revision are of a hub: leave them out for a folder")
    if kind == LOCAL and _lies_in(expanded(place), folder):
        raise RecipeError(f"{to} is the run's own folder, or lies in it: name a folder elsewhere")
    name, branch = branch_of(place, revision) if kind == HUB else (expanded(place).resolve().name, MAIN)
    names = () if labels is None else read_labels(labels)
    files = repository(
        folder, name, revision="" if branch == MAIN else branch, labels=names, license_=license_, base=base
    )
    rows = [(path, content.digests.bytes) for path, content in files.items()]
    if dry_run:
        if kind == LOCAL:
            before(files, FolderDestination(expanded(place)), overwrite=overwrite)
        if json_:
            print_json({"to": to, "files": [{"path": path, "bytes": count} for path, count in rows]})
        else:
            print_tables(
                [Table(f"Files for {to}", ("file", "size"), tuple((path, size(count)) for path, count in rows))]
            )
            line(f"Nothing was written. Beside these a push writes {RECEIPT}, which says which files are slimvit's.")
        return
    destination: Destination
    if kind == HUB:
        destination = HubDestination.of(place, revision=revision, private=private)
    else:
        destination = FolderDestination(expanded(place))
    done = push_files(
        files, destination, tool=tool(), message=f"{tool()}: {folder.resolve().name}", overwrite=overwrite
    )
    if json_:
        print_json({"url": done.url, "written": done.written, "unchanged": done.unchanged, "removed": done.removed})
        return
    removed = f", {len(done.removed)} removed" if done.removed else ""
    line(f"{len(done.written)} files written, {len(done.unchanged)} unchanged{removed}: {done.url}")


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder, or something in it, wherever links lead."""
    return folder.resolve() in (path.resolve(), *path.resolve().parents)
