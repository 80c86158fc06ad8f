"""Results on disk: a file says its statistics and the raw samples under them, and is refused if they disagree."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from toolchain.errors import ArtifactError
from toolchain.files import digest_of, read_json, write_text
from toolchain.measure.samples import explain


class Result(Protocol):
    """Raw samples with statistics that follow from them."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: `schema`, the statistics, and under `raw` what they follow from."""
        ...


R = TypeVar("R", bound=Result)
SEALED = ("raw", "raw_sha256")


def sealed(raw: dict[str, Any]) -> dict[str, Any]:
    """Raw samples as a result holds them, with their digest: it tells of a change that no statistic feels.

    Results that were written before there was a digest have none. It shows accidents and edits; it is no signature.
    """
    return {"raw_sha256": digest_of(raw), "raw": raw}


def read(path: Path) -> Any:
    """The JSON of a result's file, which may be gzipped, or a record of benchmarks with the result under `result`."""
    stored = read_json(path)
    return stored.get("result", stored) if isinstance(stored, dict) else stored


def schema_of(path: Path) -> str:
    """The schema that a file says it has, or "" ; raises StorageError if it cannot be read as JSON."""
    stored = read(path)
    return str(stored.get("schema", "")) if isinstance(stored, dict) else ""


def save(result: Result, path: Path) -> None:
    """Writes a result atomically; raises StorageError."""
    write_text(path, json.dumps(result.to_dict(), separators=(",", ":"), allow_nan=False) + "\n")


def load(path: Path, schema: str, parse: Callable[[str], R]) -> R:
    """The result in a file, all statistics in it recomputed.

    Args:
        path: the file.
        schema: what it must say it is.
        parse: makes the result from the JSON text under `raw`; raises ValidationError or ValueError.

    Raises:
        StorageError: the file cannot be read.
        ArtifactError: it has another schema, its samples are not those its design asks for, or a statistic in it
            does not follow from its samples, or these have another digest than it says.
    """
    return recomputed(read(path), str(path), schema, parse)


def recomputed(stored: Any, where: str, schema: str, parse: Callable[[str], R]) -> R:
    """The result in a JSON object that lies somewhere else than in a file of its own; arguments and errors as `load`.

    Args:
        where: how messages call it.
    """
    found = stored.get("schema") if isinstance(stored, dict) else None
    if found != schema:
        raise ArtifactError(f"{where} has schema {found!r}; this version reads {schema!r}")
    try:
        result = parse(json.dumps(stored.get("raw")))
    except ValidationError as error:
        raise ArtifactError(f"{where}: {explain(error)}") from None
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from None
    said = {key: value for key, value in stored.items() if key not in SEALED}
    follows = {key: value for key, value in result.to_dict().items() if key not in SEALED}
    for key in sorted(said.keys() | follows.keys()):
        if not equal(said.get(key), follows.get(key)):
            raise ArtifactError(
                f"{where} says {key} = {said.get(key)!r}, but its samples give {follows.get(key)!r}; "
                "the file was altered, or written by another version. Measure again."
            )
    if stored.get("raw_sha256", seal := digest_of(stored["raw"])) != seal:
        raise ArtifactError(
            f"{where}: the raw samples are not those that were written; the file was altered. Measure again."
        )
    return result


def equal(stored: Any, recomputed: Any) -> bool:
    """Equality up to the last bits of floats, which may differ between builds of numpy."""
    if isinstance(stored, dict) and isinstance(recomputed, dict):
        return stored.keys() == recomputed.keys() and all(equal(stored[k], recomputed[k]) for k in stored)
    if isinstance(stored, list) and isinstance(recomputed, list):
        return len(stored) == len(recomputed) and all(map(equal, stored, recomputed))
    if isinstance(stored, float) and isinstance(recomputed, float):
        return math.isclose(stored, recomputed, rel_tol=1e-9)
    return bool(type(stored) is type(recomputed) and stored == recomputed)
