"""A report's files in a run's folder: the pages that are drawn from report.json, and the manifest of everything."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from toolchain.errors import ArtifactError, StorageError
from toolchain.files import read_json, sha256, write_json, write_text
from toolchain.report.absent import MANIFEST
from toolchain.report.markdown import to_markdown
from toolchain.report.page import to_html
from toolchain.report.record import Listed, Report

log = logging.getLogger(__name__)
PACKAGES = ("slimvit", "torch", "timm", "onnx", "onnxruntime", "onnxsim", "numpy", "safetensors")
SMALL = 1 << 20
"""Bytes of a file that is read each time that a report is shown, at most."""


def render(report: Report, folder: Path) -> None:
    """Writes report.md and report.html, each only if it does not say this already, and lists them anew in manifest.json.

    Raises:
        StorageError: one has to be written, and the folder is read-only or full.
    """
    drawn = list[Path]()
    for name, text in (("report.md", to_markdown(report)), ("report.html", to_html(report))):
        path = folder / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
            drawn.append(path)
    if drawn and (folder / MANIFEST).is_file():
        _list_anew(drawn, folder)


def _list_anew(files: Iterable[Path], folder: Path) -> None:
    """Puts the digests of files in place of those that the manifest lists for them; a damaged manifest stays as it is."""
    try:
        manifest = read_json(folder / MANIFEST)
        fresh = {each.path: each.model_dump() for each in listing(files, folder)}
        listed = [fresh.get(entry["path"], entry) for entry in manifest["files"]]
    except (ArtifactError, KeyError, TypeError):
        return
    write_json(folder / MANIFEST, manifest | {"files": listed})


def write_report(report: Report, files: Iterable[Path], root: Path) -> None:
    """Writes report.json, its pages, and manifest.json, which lists them and `files`; raises StorageError."""
    write_json(root / "report.json", report.to_dict())
    render(report, root)
    everything = [*files, *(root / f"report.{suffix}" for suffix in ("json", "md", "html"))]
    manifest = {
        "schema": "slimvit.manifest/1",
        "recipe_digest": report.recipe_digest,
        "versions": {name: version(name) for name in PACKAGES},
        "files": [listed.model_dump() for listed in listing(everything, root)],
    }
    write_json(root / MANIFEST, manifest)


def replaced(report: Report, folder: Path) -> list[str]:
    """The files in a run's folder that are not those that its report speaks of; what is no longer there is none of them.

    A large file of the same size that is older than report.json is taken for the same, and so is one that cannot be read.
    """
    written = (folder / "report.json").stat().st_mtime_ns
    return [each.path for each in report.files if _is_other(folder / each.path, each, written)]


def _is_other(path: Path, listed: Listed, written: int) -> bool:
    """Whether a file is not the listed one; `written` is when that was listed, in ns."""
    try:
        if not path.is_file():
            return False
        facts = path.stat()
        if facts.st_size != listed.bytes:
            return True
        return (facts.st_size <= SMALL or facts.st_mtime_ns >= written) and sha256(path) != listed.sha256
    except (OSError, StorageError) as error:
        log.warning("%s; to have it compared with the report, make it readable", error)
        return False


def listing(files: Iterable[Path], root: Path) -> tuple[Listed, ...]:
    """Path below the root, size and digest of each file, sorted by path."""
    return tuple(
        Listed(path=file.relative_to(root).as_posix(), bytes=file.stat().st_size, sha256=sha256(file))
        for file in sorted(files)
    )
