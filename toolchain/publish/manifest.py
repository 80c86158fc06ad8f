"""manifest.json of a run, read back: its files with their digests, and what wrote them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from toolchain.errors import ArtifactError
from toolchain.files import read_json, sha256
from toolchain.report.record import Listed

MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """The content of manifest.json.

    Attributes:
        recipe_digest: of the recipe that was carried out.
        versions: package → version of what wrote the files.
        files: all of them but the manifest itself.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    recipe_digest: str
    versions: dict[str, str]
    files: tuple[Listed, ...]

    @staticmethod
    def load(folder: Path) -> Manifest:
        """The manifest of a run's folder; raises StorageError if there is none, ArtifactError if it is none or damaged."""
        raw = read_json(folder / MANIFEST)
        if not isinstance(raw, dict) or not str(raw.get("schema", "")).startswith("slimvit.manifest/"):
            raise ArtifactError(f"{folder / MANIFEST} is not a manifest that slimvit wrote")
        try:
            return Manifest.model_validate(raw | {"files": tuple(raw.get("files", ()))})
        except (ValidationError, TypeError):
            raise ArtifactError(
                f"{folder / MANIFEST} lists no files with their digests; it is damaged: run the recipe again"
            ) from None

    def wrong(self, folder: Path) -> list[str]:
        """The files that are missing, or are not those that were listed."""
        return [
            each.path
            for each in self.files
            if not (folder / each.path).is_file() or sha256(folder / each.path) != each.sha256
        ]

    def require(self, folder: Path) -> None:
        """Raises ArtifactError unless every file is as it is listed."""
        if wrong := self.wrong(folder):
            raise ArtifactError(
                f"{len(wrong)} of {len(self.files)} files are missing or altered: {', '.join(wrong[:5])}"
            )
