"""Schedules without paths of this machine: artifacts are named by the digest of their content, here and on every device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolchain.artifacts import open_artifact
from toolchain.errors import MeasurementError
from toolchain.on_device.runner import Schedule, VariantSchedule

FOLDER = "artifacts"
"""Where artifacts lie, below a device's folder and in a bundle: `artifacts/<digest>/<the file's own relative name>`."""

State = list[tuple[int, int] | None]
"""Size and time of change of each file of an artifact, None where there is none."""


@dataclass(frozen=True)
class PortableSchedule:
    """A schedule whose variants are named relative to a device's folder.

    Attributes:
        schedule: the session's schedule; its `files` are relative name → sha256, checked on the device before it times anything.
        sources: relative name → the file here.
    """

    schedule: Schedule
    sources: dict[str, Path]


class Portable:
    """Turns schedules into portable ones; each artifact is read once, and must not change while it is measured."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, dict[str, str], dict[str, Path], State]] = {}

    def of(self, schedule: Schedule) -> PortableSchedule:
        """The portable form of a schedule.

        Raises:
            StorageError: an artifact cannot be read.
            ArtifactError: an artifact is damaged.
            MeasurementError: an artifact changed since it was first seen.
        """
        digests: dict[str, str] = {}
        sources: dict[str, Path] = {}
        variants: list[VariantSchedule] = []
        for variant in schedule["variants"]:
            name, files, paths = self._artifact(variant["path"])
            digests |= files
            sources |= paths
            variants.append({**variant, "path": name})
        return PortableSchedule({**schedule, "variants": variants, "files": dict(sorted(digests.items()))}, sources)

    def _artifact(self, path: str) -> tuple[str, dict[str, str], dict[str, Path]]:
        """(the artifact's portable name, sha256 of its files, where they lie here)."""
        if path not in self._known:
            artifact = open_artifact(Path(path))
            root, digests = artifact.folder, artifact.file_sha256s
            folder = f"{FOLDER}/{artifact.sha256}"
            self._known[path] = (
                f"{folder}/{artifact.path.relative_to(root)}".removesuffix("/."),
                {f"{folder}/{name}": digest for name, digest in digests.items()},
                {f"{folder}/{name}": root / name for name in digests},
                _state([root / name for name in digests]),
            )
        name, digests, sources, state = self._known[path]
        if _state(list(sources.values())) != state:
            raise MeasurementError(f"{path} changed while it was measured; run the comparison again")
        return name, digests, sources


def _state(files: list[Path]) -> State:
    return [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None for path in files]
