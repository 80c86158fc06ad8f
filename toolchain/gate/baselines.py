"""Baselines of a gate: fetched from a hub if needed, and checked against their digests."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path, PurePosixPath

import huggingface_hub

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, BaselineError, StorageError
from toolchain.gate.config import BaselineSection, GateConfig
from toolchain.places import HUB_URL
from toolchain.surgery.refusals import refusal

FILE_ON_HUB = re.compile(r"(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def fetched_file(path: str) -> Path:
    """The file of this machine for a path, which may be hf://ORG/NAME/FILE.

    Raises:
        BaselineError: it cannot be had.
    """
    return Path(_fetched(path, BaselineSection(path=path, sha256="0" * 64)).path)


def fetched(config: GateConfig) -> GateConfig:
    """The gate with files of this machine for baselines that lie on a hub and that a cell names; the client's cache keeps them.

    Raises:
        BaselineError: one cannot be had.
    """
    named = {cell.baseline for cell in config.cell}
    baselines = {name: _fetched(name, each) if name in named else each for name, each in config.baseline.items()}
    return config.model_copy(update={"baseline": baselines})


def _fetched(name: str, baseline: BaselineSection) -> BaselineSection:
    if not baseline.on_hub:
        return baseline
    place = FILE_ON_HUB.fullmatch(baseline.path.removeprefix(HUB_URL))
    if place is None:
        raise BaselineError(f"the baseline {name!r} is written {HUB_URL}ORG/NAME/FILE, got {baseline.path!r}")
    repository, revision, file = place["repository"], place["revision"], place["file"]

    def had(*wanted: str) -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=[*wanted]))
        except Exception as error:
            where = f"{repository}@{revision}" if revision else repository
            raise BaselineError(f"the baseline {name!r} cannot be fetched: {refusal(error, where)}") from error

    path = had(file) / file
    if not path.exists():
        raise BaselineError(
            f"the baseline {name!r} is not there: {repository} has no file {file}; name one that it has"
        )
    with contextlib.suppress(ArtifactError):  # a damaged one is refused by name when its digest is taken
        if beside := open_artifact(path).needs:
            had(file, *(str(PurePosixPath(file).parent / each) for each in beside))
    return baseline.model_copy(update={"path": str(path)})


def require_baselines(config: GateConfig) -> None:
    """Nothing, if every baseline that a cell names is there and is the one that was meant.

    Raises:
        BaselineError: one is missing, damaged, or has another digest.
    """
    for name in dict.fromkeys(cell.baseline for cell in config.cell if cell.baseline):
        wanted = config.baseline[name]
        path = Path(wanted.path)
        if not path.exists():
            raise BaselineError(
                f"the baseline {name!r} is not at {path}; fetch it before the gate runs. It is never replaced by "
                "numbers of an earlier run."
            )
        try:
            digest = open_artifact(path).sha256
        except (ArtifactError, StorageError) as error:
            raise BaselineError(f"the baseline {name!r} cannot be read: {error}") from error
        if wanted.built and any(
            Path(cell.artifact).resolve() == path.resolve() for cell in config.cell if cell.baseline == name
        ):
            raise BaselineError(
                f"the baseline {name!r} is the artifact itself, {path}; build it from the base branch, elsewhere"
            )
        if not wanted.built and digest != wanted.sha256:
            raise BaselineError(
                f"the baseline {name!r} at {path} has sha256 {digest}, the gate names {wanted.sha256}; fetch that "
                "artifact, or review the new one and name its digest."
            )
