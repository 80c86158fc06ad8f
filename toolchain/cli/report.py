"""report: a run's report, printed again and drawn anew."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import print_json, print_part, print_report
from toolchain.errors import RecipeError, StorageError

if TYPE_CHECKING:
    from toolchain.report.record import Report

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
        _require_each_once(folders)
        reports = {str(folder): Report.load(folder) for folder in folders}
        for folder in folders:
            _warn_of_others(reports[str(folder)], folder)
        if json_:
            print_json({name: record.to_dict() for name, record in reports.items()})
        else:
            print_part(side_by_side(reports))
        return
    (folder,) = folders
    record = Report.load(folder)
    _warn_of_others(record, folder)
    try:
        render(record, folder)
    except StorageError as error:  # an archive may be read-only; what was asked for is to see it
        log.warning("%s", error)
    print_json(record.to_dict()) if json_ else print_report(record, folder)


def _require_each_once(folders: Sequence[Path]) -> None:
    """Raises RecipeError if one folder is named twice."""
    for index, folder in enumerate(folders):
        if folder.resolve() in (other.resolve() for other in folders[:index]):
            raise RecipeError(f"{folder} is named twice; name every run once")


def _warn_of_others(record: Report, folder: Path) -> None:
    """Warns where files of a later run, or of a person, lie in place of those that a report speaks of."""
    from toolchain.report.files import replaced

    if others := replaced(record, folder):
        count = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        log.warning(
            "%s: %s not as in this report (%s): a later run was interrupted, or someone changed them. To renew the report, "
            "repeat the run.",
            folder,
            count,
            ", ".join(others[:3]) + (", …" if len(others) > 3 else ""),
        )
