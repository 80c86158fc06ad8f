"""Results on disk: a file holds statistics and raw samples, and is refused if the statistics do not follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from toolchain.errors import ArtifactError
from toolchain.files import digest_of, read_json
from toolchain.records import checked


class Result(Protocol):
    """Raw samples with statistics that follow from them.

    Attributes:
        name: the schema of its files.
    """

    name: ClassVar[str]

    @property
    def headline(self) -> str:
        """The result in one line."""
        ...

    def to_dict(self) -> dict[str, object]:
        """The JSON object: `schema`, the statistics, and under `raw` what they follow from."""
        ...

    @staticmethod
    def load(path: Path) -> Result:
        """The result in a file; raises as `load` of this module."""
        ...


R = TypeVar("R", bound=Result)
SEALED = ("raw", "raw_sha256")
RECORDS = "slimvit.benchmarks/"
"""How the schema of a record of benchmarks begins."""


def sealed(raw: dict[str, object]) -> dict[str, object]:
    """Raw samples with their digest, which shows changes that no statistic shows.

    Results that were written before there was a digest have none. It shows accidents and edits; it is no signature.
    """
    return {"raw_sha256": digest_of(raw), "raw": raw}


def read(path: Path) -> Any:
    """The JSON of a result's file, which may be gzipped, or a record of benchmarks with the result under `result`."""
    stored = read_json(path)
    is_record = isinstance(stored, dict) and str(stored.get("schema")).startswith(RECORDS)
    return stored.get("result") if is_record else stored


def schema_of(path: Path) -> str:
    """The schema that a file says it has, or "" ; raises StorageError if it cannot be read as JSON."""
    stored = read(path)
    return str(stored.get("schema", "")) if isinstance(stored, dict) else ""


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
        where: its name in messages.
    """
    found = stored.get("schema") if isinstance(stored, dict) else None
    if found != schema:
        raise ArtifactError(f"{where} has schema {found!r}; this version reads {schema!r}")
    raw = stored.get("raw")
    if stored.get("raw_sha256", seal := digest_of(raw)) != seal:
        raise ArtifactError(
            f"{where}: the raw samples are not those that were written; the file was altered. Measure again."
        )
    try:
        with checked(ArtifactError, where):
            result = parse(json.dumps(raw))
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from None
    said = {key: value for key, value in stored.items() if key not in SEALED}
    follows = {key: value for key, value in result.to_dict().items() if key not in SEALED}
    if (first := difference(said, follows)) is not None:
        key, ours, theirs = first
        raise ArtifactError(
            f"{where} says {key} = {ours!r}, but its samples give {theirs!r}; "
            "the file was altered, or written by another version. Measure again."
        )
    return result


def difference(said: Any, follows: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """(path, stated value, derived value) of the first difference of two JSON values; None if they are equal.

    The last bits of floats may differ, as they do between builds of numpy.
    """
    if isinstance(said, dict) and isinstance(follows, dict):
        names = sorted(said.keys() | follows.keys())
        pairs = [(name, said.get(name), follows.get(name)) for name in names]
    elif isinstance(said, list) and isinstance(follows, list) and len(said) == len(follows):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(said, follows, strict=True))]
    elif isinstance(said, float) and isinstance(follows, float):
        return None if math.isclose(said, follows, rel_tol=1e-9) else (key, said, follows)
    else:
        return None if type(said) is type(follows) and said == follows else (key, said, follows)
    inner = (difference(left, right, f"{key}.{name}".lstrip(".")) for name, left, right in pairs)
    return next((each for each in inner if each is not None), None)
