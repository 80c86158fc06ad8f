"""The facts that engine.json has of every engine: what built it, from which file, and the digest and size of what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError
from toolchain.files import sha256
from toolchain.targets.base import EngineBuild, TargetInfo

ENGINE_SCHEMA = "slimvit.engine/1"


def source_digests(onnx: Path) -> dict[str, str | dict[str, str]]:
    """The entries of engine.json on the source file: its digest, and those of its weight files.

    Raises:
        StorageError: one cannot be read.
    """
    try:
        digests = open_artifact(onnx).file_sha256s
    except ArtifactError:  # what is to read the file has the better words
        digests = {onnx.name: sha256(onnx)}
    own = digests.pop(onnx.name)
    return {"onnx": onnx.name, "onnx_sha256": own, **({"onnx_data_sha256": digests} if digests else {})}


def described(built: EngineBuild, info: TargetInfo, source: Mapping[str, object]) -> EngineBuild:
    """An engine with the facts that every engine has; what its target says itself counts.

    Args:
        built: by the target.
        info: of the target.
        source: of `source_digests`.
    """
    engine = open_artifact(built.path)
    digests = engine.file_sha256s
    weights = built.path.with_suffix(".bin").name
    facts = {
        "schema": ENGINE_SCHEMA,
        "target": info.target,
        "runtime": info.runtime,
        "version": info.version,
        **source,
        "engine": built.path.name,
        "engine_sha256": digests.get(built.path.name, engine.sha256),
        **({"weights_sha256": digests[weights]} if weights in digests else {}),
        "size_bytes": engine.size_bytes,
        "loaded": "pass",
        "loaded_reason": "",
    }
    return EngineBuild(built.path, facts | dict(built.facts))
