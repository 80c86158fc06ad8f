"""Off-the-shelf models beside a dense one, as a result: rows, each with the comparison that it follows from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.artifact import read_json, write_json
from toolchain.bench.protocol import Comparison
from toolchain.bench.stored import equal
from toolchain.errors import ArtifactError

SCHEMA = "slimvit.bench.references/1"


@dataclass(frozen=True)
class Row:
    """One model in the table.

    Attributes:
        name: of the file, or timm's.
        kind: "dense", "compressed" or "timm, untrained".
        params: numbers stored in its tensors, see `stored_params`.
        macs: multiply-accumulates of a call, None where the graph has operators that are not counted.
        size_bytes: of all files.
        latency_ms: beside the dense model in the same sessions; of the dense one, from the first comparison.
        comparison: with the dense model; None for itself.
    """

    name: str
    kind: str
    params: int
    macs: int | None
    size_bytes: int
    latency_ms: float | None
    comparison: Comparison | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a row, with the raw samples of its comparison."""
        found = self.comparison
        return {
            "name": self.name,
            "kind": self.kind,
            "params": self.params,
            "macs": self.macs,
            "size_bytes": self.size_bytes,
            "latency_ms": self.latency_ms,
            "verdict": None if found is None else found.verdict,
            "ratio": None if found is None else found.ratio.to_ratio(),
            "comparison": None if found is None else found.to_dict(),
        }


@dataclass(frozen=True)
class References:
    """The dense model first, then each of the others, all timed against the very same dense file."""

    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `bench references --json`."""
        return {"schema": SCHEMA, "rows": [row.to_dict() for row in self.rows]}

    def save(self, path: Path) -> None:
        """Writes `to_dict` atomically; raises StorageError."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: Path) -> References:
        """The table in a file, what is said of latency and bytes recomputed; parameters and MACs are as they were counted.

        Raises:
            StorageError: the file cannot be read.
            ArtifactError: it is no such table, or a number does not follow from the samples in it.
        """
        stored = read_json(path)
        if stored.get("schema") != SCHEMA or not isinstance(stored.get("rows"), list) or len(stored["rows"]) < 2:
            raise ArtifactError(f"{path} is no table of schema {SCHEMA!r} with a dense model and others")
        try:
            others = [_row(each, f"{path}, row {each['name']!r}") for each in stored["rows"][1:]]
            first = stored["rows"][0]
            facts = {row.comparison.artifacts["A"] for row in others if row.comparison is not None}
            if len(facts) != 1:
                raise ArtifactError(f"{path}: the rows were timed against different dense files")
            (dense,) = facts
            assert others[0].comparison is not None
            latency_ms = others[0].comparison.latency_ms("A")
            own = Row(first["name"], first["kind"], first["params"], first["macs"], dense.size_bytes, latency_ms, None)
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} is no table of schema {SCHEMA!r}: {error!r}") from None
        found = References((own, *others))
        for said, row in zip(stored["rows"], found.rows, strict=True):
            follows = row.to_dict()
            for key in follows:
                if key != "comparison" and not equal(said.get(key), follows[key]):
                    raise ArtifactError(
                        f"{path} says {key} of {row.name!r} is {said.get(key)!r}, but its samples give {follows[key]!r}; "
                        "the file was altered"
                    )
        return found


def _row(stored: Mapping[str, Any], where: str) -> Row:
    """A row other than the dense model's, from its comparison."""
    found = Comparison.recomputed(stored["comparison"], where)
    size_bytes, latency_ms = found.artifacts["B"].size_bytes, found.latency_ms("B")
    return Row(stored["name"], stored["kind"], stored["params"], stored["macs"], size_bytes, latency_ms, found)
