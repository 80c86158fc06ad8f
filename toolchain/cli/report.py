"""report: a run's report, printed again and drawn anew."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import print_json, print_part, print_report
from toolchain.errors import StorageError

log = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(report)


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="A run's folder; several are set side by side.")],
    json_: JsonFlag = False,
) -> None:
    """Print a run's report again, and rewrite report.md and report.html from report.json; set several runs side by side."""
    from toolchain.report.files import render
    from toolchain.report.record import Report
    from toolchain.report.several import side_by_side

    if len(folders) > 1:
        reports = {str(folder): Report.load(folder) for folder in folders}
        if json_:
            print_json({name: record.to_dict() for name, record in reports.items()})
        else:
            print_part(side_by_side(reports))
        return
    (folder,) = folders
    record = Report.load(folder)
    try:
        render(record, folder)
    except StorageError as error:  # an archive may be read-only; what was asked for is to see it
        log.warning("%s", error)
    print_json(record.to_dict()) if json_ else print_report(record, folder)
