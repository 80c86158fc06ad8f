"""manifest.json of a run, read back: its files with their digests, and what wrote them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from toolchain.errors import ArtifactError
from toolchain.files import read_json, sha256
from toolchain.report.absent import MANIFEST, require_run


class Entry(BaseModel):
    """A file of a run: its path below the folder, and what it is known by."""

    model_config = ConfigDict(frozen=True, strict=True)

    path: str
    sha256: str
    bytes: int | None = None


class Manifest(BaseModel):
    """The content of manifest.json, of which only the files are needed to verify them.

    Attributes:
        recipe_digest: of the recipe that was carried out.
        versions: package → version of what wrote the files.
        files: all of them but the manifest itself.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    recipe_digest: str = ""
    versions: dict[str, str] = {}
    files: tuple[Entry, ...]

    @staticmethod
    def load(folder: Path) -> Manifest:
        """The manifest of a run's folder; raises StorageError if there is none, ArtifactError if it is none or damaged."""
        require_run(folder, MANIFEST)
        raw = read_json(folder / MANIFEST)
        if not isinstance(raw, dict) or not str(raw.get("schema", "")).startswith("slimvit.manifest/"):
            raise ArtifactError(f"{folder / MANIFEST} is not a manifest that slimvit wrote")
        try:
            return Manifest.model_validate(raw | {"files": tuple(raw["files"])})
        except (ValidationError, TypeError, KeyError):
            raise ArtifactError(
                f"{folder / MANIFEST} lists no files with their digests; it is damaged: run the recipe again"
            ) from None

    def wrong(self, folder: Path) -> list[str]:
        """The files that are missing, or are not those that were listed."""
        return [each.path for each in self.files if not _is(folder / each.path, each.sha256)]

    def require(self, folder: Path) -> None:
        """Raises ArtifactError unless every file is as it is listed."""
        if wrong := self.wrong(folder):
            raise ArtifactError(
                f"{len(wrong)} of {len(self.files)} files are missing or altered: {', '.join(wrong[:5])}; "
                "put them back, or carry out the run's command again"
            )

    def require_these(self, folder: Path, paths: Iterable[str]) -> None:
        """Raises ArtifactError unless each of some files is listed, and is as it is listed; the others may be large, and are not read."""
        listed = {each.path: each.sha256 for each in self.files}
        wrong = [path for path in paths if path not in listed or not _is(folder / path, listed[path])]
        if wrong:
            raise ArtifactError(
                f"{', '.join(wrong[:5])} of {folder} {'is' if len(wrong) == 1 else 'are'} not what {MANIFEST} lists, so the "
                "report is not of these files: run the recipe again"
            )


def _is(path: Path, digest: str) -> bool:
    """Whether there is a file of a digest; of a name that can be none there is not."""
    try:
        return path.is_file() and sha256(path) == digest
    except (OSError, ValueError):
        return False
