"""A session's plan without any path of this machine: artifacts are named by their content, here and on every device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifacts import open_artifact
from toolchain.errors import MeasurementError

FOLDER = "artifacts"
"""Where artifacts lie, below a device's folder and in a bundle: `artifacts/<digest>/<the file's own relative name>`."""


@dataclass(frozen=True)
class PortablePlan:
    """A plan whose variants are named relative to a device's folder.

    Attributes:
        plan: the session's plan; its `files` are relative name → sha256, checked on the device before it times anything.
        sources: relative name → the file here.
    """

    plan: dict[str, Any]
    sources: dict[str, Path]


class Portable:
    """Turns plans into portable ones; each artifact is read once, and must not change while it is measured."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, dict[str, str], dict[str, Path], list[Any]]] = {}

    def of(self, plan: Mapping[str, Any]) -> PortablePlan:
        """The portable form of a plan.

        Raises:
            StorageError: an artifact cannot be read.
            ArtifactError: an artifact is damaged.
            MeasurementError: an artifact changed since it was first seen.
        """
        digests: dict[str, str] = {}
        sources: dict[str, Path] = {}
        variants = []
        for variant in plan["variants"]:
            name, files, found = self._artifact(variant["path"])
            digests |= files
            sources |= found
            variants.append({**variant, "path": name})
        return PortablePlan({**plan, "variants": variants, "files": dict(sorted(digests.items()))}, sources)

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


def _state(files: list[Path]) -> list[Any]:
    return [(path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else None for path in files]
