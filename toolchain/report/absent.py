"""What is told where the folder of a run was named, and none is there."""

from __future__ import annotations

from pathlib import Path

from toolchain.errors import StorageError

REPORT, MANIFEST = "report.json", "manifest.json"
PRIVATE = ".slimvit"
"""Where a run keeps its records from its first stage on."""


def require_run(folder: Path, file: str = REPORT) -> None:
    """Raises StorageError, with what to give instead, unless `folder` holds a file that a finished run has."""
    if (folder / file).exists():
        return
    hint = _hint(folder)
    raise StorageError(f"{folder} is not the folder of a finished run: {_why(folder, file)}; {hint}")


def runs_below(folder: Path) -> list[str]:
    """The names of the runs that lie in a folder."""
    return sorted(each.parent.name for each in folder.glob(f"*/{REPORT}")) if folder.is_dir() else []


def _why(folder: Path, file: str) -> str:
    if not folder.exists():
        return f"it is not there, seen from {Path.cwd()}"
    return f"it has no {file}" if folder.is_dir() else "it is a file"


def _hint(folder: Path) -> str:
    """The nearest thing that could have been meant."""
    if runs := runs_below(folder):
        return f"runs lie in it, so give {' or '.join(str(folder / name) for name in runs[:3])}"
    if (folder / PRIVATE).is_dir():
        return "the run in it was not finished, so start its command again; it goes on where it stopped"
    around = next((each for each in folder.parents if (each / REPORT).exists()), None)
    if folder.exists() and around is not None:
        return f"it lies in a run, so give {around}"
    return "give the folder that the --out of `slimvit run` or `slimvit shrink` named"
