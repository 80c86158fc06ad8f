"""Recorded cells: one JSON file each, valid for as long as everything that it depends on is the same."""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from suite import Cell, Suite

from toolchain.compress.closed_form import betas_for
from toolchain.files import digest_of, read_json, write_json
from toolchain.on_device.runner import fingerprint
from toolchain.pipeline.job import tool
from toolchain.recipe import LOCAL, CompressSection, Recipe, model_source
from toolchain.training.evaluate import Accuracy

SCHEMA = "slimvit.benchmarks.cell/1"
Record = dict[str, Any]
DECIDE = ("model", "data", "train", "compress", "budget", "finetune")
"""The sections of a recipe that a cell depends on; what is made of the model afterwards is not measured."""
YOUNGER = {"model": ("output", "resample_patches"), "data": ("classes", "exif_orientation", "workers")}
"""Section → keys that came after cells were recorded and references shipped."""


def pass_seconds(record: Record) -> tuple[int, float]:
    """(how often a cell of a scale suite went through the model in closed form, once for each β; the seconds of once)."""
    recipe = record["definition"]["recipe"]
    section = CompressSection.model_validate(recipe["compress"])
    tried = len(betas_for(section, record["dense"]["macs"], recipe["data"]["calibration_images"]))
    return tried, record["seconds"].get("closed form", 0.0) / tried


def versions() -> dict[str, str]:
    """What carries a cell out."""
    return {"tool": tool(), "torch": torch.__version__, "timm": timm.__version__}


def cell_key(recipe: Recipe, peer: Mapping[str, Any], weights_sha256: str, extra: Mapping[str, str]) -> str:
    """Digest of everything that a cell's outcome depends on; its name and its suite are not part of it.

    Args:
        recipe: with what the sweeps chose filled in; where its files lie does not count.
        peer: settings of another tool; {} for slimvit's methods.
        weights_sha256: of the reference.
        extra: versions that matter to this cell besides `versions()`.
    """
    raw = described(recipe)
    decides = {section: raw[section] for section in DECIDE}
    return digest_of("benchmark cell", decides, dict(peer), weights_sha256, {**versions(), **extra})


def sections(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data; keys that are younger than the records are left out at their defaults, which change nothing."""
    raw = recipe.model_dump(mode="json")
    for section, names in YOUNGER.items():
        known = getattr(recipe, section)
        for name in names:
            if raw[section][name] == type(known).model_fields[name].default:
                del raw[section][name]
    return raw


def described(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is recorded: without paths."""
    raw = sections(recipe)
    if model_source(recipe.model.name)[0] == LOCAL:
        raw["model"]["name"] = LOCAL
    raw["model"]["checkpoint"] = "reference" if raw["model"]["checkpoint"] else ""
    return raw


def machine() -> dict[str, Any]:
    """Where a cell was measured; the date and the load are noted and decide nothing."""
    return {
        "fingerprint": fingerprint(torch.get_num_threads()),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


def pack(found: Accuracy) -> dict[str, Any]:
    """{"total", "wrong", "correct"}: which images were right, one bit each, as base64 of big-endian bits."""
    right = (found.predictions == found.labels).numpy()
    bits = base64.b64encode(np.packbits(right).tobytes()).decode()
    return {"total": found.total, "wrong": found.wrong, "correct": bits}


def unpack(packed: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The inverse of `pack`: bool [total], True where the prediction was right."""
    bits = np.frombuffer(base64.b64decode(packed["correct"]), dtype=np.uint8)
    right = np.unpackbits(bits, count=packed["total"]).astype(bool)
    if int((~right).sum()) != packed["wrong"]:
        raise ValueError(f"{packed['wrong']} images are said to be wrong, the bits say {int((~right).sum())}")
    return right


class Results:
    """The recorded cells below one folder, which has a folder for each suite."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, suite: str, cell: str) -> Path:
        """Where a cell is recorded."""
        return self.root / suite / f"{cell}.json"

    def read(self, suite: str, cell: str) -> Record | None:
        """The record of a cell, whatever it was measured from; None if there is none."""
        path = self.path(suite, cell)
        if not path.is_file():
            return None
        record: Record = read_json(path)
        return record if record.get("schema") == SCHEMA else None

    def of(self, suite: Suite) -> list[Record]:
        """The records of a suite's cells, in its order."""
        return [record for cell in suite.cells if (record := self.read(suite.name, cell.name)) is not None]

    def with_key(self, key: str) -> Record | None:
        """A record of any suite under that key: what two suites ask for is measured once."""
        return next((record for record in self._all() if record["key"] == key), None)

    def _all(self) -> Iterator[Record]:
        for path in sorted(self.root.glob("*/*.json")):
            record = read_json(path)
            if isinstance(record, dict) and record.get("schema") == SCHEMA:
                yield record

    def save(self, suite: Suite, cell: Cell, key: str, outcome: Mapping[str, Any]) -> Record:
        """What is recorded of a cell."""
        about = {"suite": suite.name, "cell": cell.name, "row": cell.row, "reference": cell.reference}
        about |= {"seed": cell.seed, "training": cell.training, "sweep": cell.sweep, "tried": dict(cell.tried)}
        own = {name: value for name, value in outcome.items() if name not in ("schema", "key", *about)}
        record = {"schema": SCHEMA, **about, "key": key, **own}
        write_json(self.path(suite.name, cell.name), record)
        return record


@dataclass(frozen=True)
class Try:
    """What one value of a sweep came to on validation, over all seeds that it was tried on."""

    tried: dict[str, Any]
    wrong: int
    total: int
    kl: float
    seeds: int


def tries_of(records: Sequence[Record]) -> list[Try]:
    """The tries of a sweep, in the order of their first records; errors are summed over seeds, the divergence averaged."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(record["tried"], sort_keys=True), []).append(record)
    return [
        Try(
            tried=group[0]["tried"],
            wrong=sum(record["validation"]["wrong"] for record in group),
            total=sum(record["validation"]["total"] for record in group),
            kl=float(np.mean([record["validation"]["kl"] for record in group])),
            seeds=len(group),
        )
        for group in groups.values()
    ]


def best_try(records: Sequence[Record]) -> Try:
    """The try with the fewest errors on validation, then the least divergence from the dense model there.

    The test split is not looked at.
    """
    return min(tries_of(records), key=lambda found: (found.wrong, found.kl))
