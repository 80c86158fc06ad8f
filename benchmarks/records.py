"""Recorded cells: one gzipped JSON file each, in one format, valid for as long as what it depends on is the same.

A record says what was measured (`definition`), where and by what (`machine`, `date`, `versions`), how long it took
(`seconds`), and under `result` what came out, raw samples included.
"""

from __future__ import annotations

import datetime as dt
import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from kinds.base import Cell

from toolchain.errors import ArtifactError, StorageError
from toolchain.files import atomic_path, digest_of, read_json
from toolchain.on_device.runner import fingerprint
from toolchain.places import LOCAL, model_source
from toolchain.recipe import Recipe
from toolchain.version import tool

SCHEMA = "slimvit.benchmarks/1"
SUFFIX = ".json.gz"
UNALIGNED = 1
"""`compress.align` of all that is recorded and names no target: 8 became its default afterwards."""
YOUNGER = {"model": ("output", "resample_patches"), "data": ("classes", "exif_orientation", "workers")}
"""Section → keys that came after cells were recorded and references shipped."""


@dataclass(frozen=True)
class Record:
    """What is known of one cell.

    Attributes:
        suite, cell, kind: which.
        key: digest of everything that the outcome depends on.
        definition: what was measured, as its kind describes it.
        result: what came out, raw samples included; a result of `slimvit bench` lies here as that command writes it.
        machine: as the device runner sees it, its instruction set under `flags`.
        date: ISO date, "" where a record of earlier days has none.
        versions: of what carried it out, as far as known.
        seconds: what each phase took.
        same_as: suite/cell of the record that this one was taken from.
    """

    suite: str
    cell: str
    kind: str
    key: str
    definition: dict[str, Any]
    result: dict[str, Any]
    machine: dict[str, Any]
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    same_as: str = ""


class Results:
    """The recorded cells below one folder, which has a folder for each suite: its page, and its records in `records`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, suite: str, cell: str) -> Path:
        """Where a cell is recorded."""
        return self.root / suite / "records" / f"{cell}{SUFFIX}"

    def read(self, suite: str, cell: str) -> Record | None:
        """The record of a cell, whatever it was measured from; None if there is none that can be read."""
        return read_record(self.path(suite, cell))

    def below(self, suite: str, cell: str) -> list[Record]:
        """The records that were made beside that of a cell, by name: their names begin with its own and a dot."""
        paths = sorted(self.path(suite, cell).parent.glob(f"{cell}.*{SUFFIX}"))
        records = [read_record(path) for path in paths if path != self.path(suite, cell)]
        return [record for record in records if record is not None]

    def with_key(self, kind: str, key: str) -> Record | None:
        """A record of any suite under that key: what two suites ask for is measured once."""
        return next((record for record in self.all() if (record.kind, record.key) == (kind, key)), None)

    def all(self) -> Iterator[Record]:
        """Every record that can be read."""
        for path in sorted(self.root.glob(f"*/records/*{SUFFIX}")):
            if (record := read_record(path)) is not None:
                yield record

    def save(self, record: Record) -> Record:
        """Writes a record whole or not at all; equal records are equal bytes."""
        content = json.dumps({"schema": SCHEMA, **asdict(record)}, separators=(",", ":"), allow_nan=False)
        with atomic_path(self.path(record.suite, record.cell)) as temporary:
            temporary.write_bytes(gzip.compress(content.encode(), 9, mtime=0))
        return record


def read_record(path: Path) -> Record | None:
    """The record in a file; None if there is none that this version reads."""
    try:
        stored = read_json(path)
    except (ArtifactError, StorageError):
        return None
    if not isinstance(stored, dict) or stored.pop("schema", None) != SCHEMA:
        return None
    return Record(**stored)


def same(record: Record, suite: str, cell: Cell, definition: dict[str, Any]) -> Record:
    """A record as that of another cell which asks for the same."""
    origin = record.same_as or f"{record.suite}/{record.cell}"
    return replace(record, suite=suite, cell=cell.name, definition=definition, same_as=origin)


def versions() -> dict[str, str]:
    """What carries a cell out."""
    return {"tool": tool(), "torch": torch.__version__, "timm": timm.__version__}


def here() -> dict[str, Any]:
    """This machine, as a record names it."""
    machine: dict[str, Any] = fingerprint(torch.get_num_threads())["machine"]
    return machine


def today() -> str:
    """The date, which is noted and decides nothing."""
    return dt.datetime.now(dt.UTC).date().isoformat()


def sections(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data; keys that are younger than the records are left out at their defaults, which change nothing."""
    raw = recipe.model_dump(mode="json")
    for section, names in YOUNGER.items():
        known = getattr(recipe, section)
        for name in names:
            if raw[section][name] == type(known).model_fields[name].default:
                del raw[section][name]
    if recipe.compress.align == UNALIGNED and not recipe.budget.latency:
        del raw["compress"]["align"]
    return raw


def described(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is recorded: without paths."""
    raw = sections(recipe)
    if model_source(recipe.model.name)[0] == LOCAL:
        raw["model"]["name"] = LOCAL
    raw["model"]["checkpoint"] = "reference" if raw["model"]["checkpoint"] else ""
    return raw


def recipe_digest(recipe: Recipe) -> str:
    """What a dense model depends on: the model, the data, its training and the seed."""
    raw = sections(recipe)
    return digest_of({name: raw[name] for name in ("model", "data", "train")}, recipe.compress.seed)
