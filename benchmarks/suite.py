"""A suite in TOML → typed references and cells, with every recipe that they imply."""

from __future__ import annotations

import copy
import itertools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolchain.errors import RecipeError
from toolchain.recipe import Recipe

Training = Literal["zero", "recovered"]
PEER = "peer"
"""Settings below this name are another tool's, and no key of a recipe."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reference(_Strict):
    """A dense model that is trained once for each seed; `more_seeds` are for the groups that name them."""

    seeds: tuple[int, ...] = Field(min_length=1)
    more_seeds: tuple[int, ...] = ()
    recipe: dict[str, Any]

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Every seed that a group may name."""
        return self.seeds + self.more_seeds


class Group(_Strict):
    """Cells that share a name.

    Attributes:
        name: the first part of each cell's name.
        reference: which dense model they start from; "" where a cell needs no trained one.
        seeds: which of the reference's seeds; all by default.
        training: whether the cells are measured without training, after recovery, or both.
        settings: dotted recipe keys, or `peer.…`, that every cell has.
        grid: dotted key → values; the cells are the product.
        sweep: what the cells are tries of; a try is a cell like others, and is shown apart.
        best: sweeps whose best try gives this group the values of the sweep's grid.
    """

    name: str
    reference: str = ""
    seeds: tuple[int, ...] | None = None
    training: tuple[Training, ...] = ("zero",)
    settings: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    sweep: str = ""
    best: tuple[str, ...] = ()


class _File(_Strict):
    title: str
    text: str = ""
    kind: Literal["accuracy", "scale"] = "accuracy"
    references: dict[str, Reference] = {}
    recovery: dict[str, Any] = {}
    cells: tuple[Group, ...] = Field(min_length=1)
    compare: tuple[tuple[str, str], ...] = ()
    latency: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        name: unique in its suite, and the name of its file.
        row: the name without training, reference and seed: cells of a row differ in nothing else.
        reference, seed, training: the dense model that it starts from, and whether it is trained after.
        settings: dotted key → value, the sweeps' choices not among them.
        tried: the part of `settings` that came from the grid.
        sweep, best: as in `Group`.
    """

    name: str
    row: str
    reference: str
    seed: int
    training: Training
    settings: Mapping[str, Any]
    tried: Mapping[str, Any]
    sweep: str = ""
    best: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The name of the reference with its seed, which is the name of its folder."""
        return f"{self.reference}_s{self.seed}" if self.reference else ""


@dataclass(frozen=True)
class Suite:
    """Everything that a suite's file says."""

    name: str
    title: str
    text: str
    kind: str
    references: Mapping[str, Reference]
    recovery: Mapping[str, Any]
    cells: tuple[Cell, ...]
    compare: tuple[tuple[str, str], ...] = ()
    latency: tuple[tuple[str, str], ...] = ()
    sweeps: Mapping[str, tuple[Cell, ...]] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> Suite:
        """The suite of a file, all its names resolved; raises RecipeError if it contradicts itself."""
        try:
            raw = _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise RecipeError(f"cannot read the suite {path}: {error.strerror}") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise RecipeError(f"{path} is not a suite: {error}") from None
        cells = tuple(cell for group in raw.cells for cell in _expand(group, raw.references, path))
        names = [cell.name for cell in cells]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"{path} has two cells {doubled[0]!r}; give one of their groups another name")
        sweeps = {c.sweep: tuple(o for o in cells if o.sweep == c.sweep) for c in cells if c.sweep}
        for cell in cells:
            for sweep in cell.best:
                if sweep not in sweeps:
                    raise RecipeError(f"{path}: {cell.name} takes the best of {sweep!r}; known: {', '.join(sweeps)}")
        rows = {cell.row for cell in cells}
        for row in (row for pair in (*raw.compare, *raw.latency) for row in pair):
            if row not in rows:
                raise RecipeError(f"{path} compares {row!r}, which is no row; known: {', '.join(sorted(rows))}")
        timed = {cell.row for cell in cells if cell.reference and cell.training == "zero"}
        for row in (row for pair in raw.latency for row in pair):
            if row not in timed:
                raise RecipeError(f"{path} times {row!r}, which has no cell without training from a dense model")
        fields = (raw.title, raw.text, raw.kind, raw.references, raw.recovery, cells, raw.compare, raw.latency, sweeps)
        return Suite(path.stem, *fields)

    def reference_recipe(self, reference: str, seed: int) -> Recipe:
        """The recipe that a reference is trained by."""
        raw = copy.deepcopy(self.references[reference].recipe)
        raw["compress"] = {"method": "none", "seed": seed}
        return Recipe.from_dict(raw)

    def recipe(self, cell: Cell, chosen: Mapping[str, Any] | None = None, checkpoint: str = "") -> Recipe:
        """The recipe of a cell.

        Args:
            cell: which.
            chosen: what its sweeps gave; None where they are not known yet, and the defaults stand in for it.
            checkpoint: the reference's weights; "" leaves the reference's [train] in their place.
        """
        raw = copy.deepcopy(dict(self.references[cell.reference].recipe)) if cell.reference else {}
        flat: dict[str, Any] = {"compress.seed": cell.seed, **(chosen or {}), **cell.settings}
        if checkpoint:
            raw.pop("train", None)
            flat |= {"model.checkpoint": checkpoint, "model.pretrained": False}
        if cell.training == "recovered":
            flat = {**{f"finetune.{key}": value for key, value in self.recovery.items()}, **flat}
        if any(key.startswith(f"{PEER}.") for key in flat):
            flat = {key: value for key, value in flat.items() if not key.startswith("budget.")}
            flat["compress.method"] = "none"
        for key, value in flat.items():
            section = key.partition(".")[0]
            if section == PEER or (section == "finetune" and cell.training == "zero"):
                continue
            _put(raw, key, value)
        return Recipe.from_dict(raw)

    def peer(self, cell: Cell, chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings of another tool that a cell is measured with, and the budget; {} for slimvit's own methods."""
        flat = {**(chosen or {}), **cell.settings}
        own = {key.partition(".")[2]: value for key, value in flat.items() if key.startswith(f"{PEER}.")}
        return {**own, "params": flat["budget.params"]} if own else {}


def epochs(recipe: Recipe) -> dict[str, int]:
    """How often a method sees the training images, before and after it decides what to remove."""
    return {
        "gates": recipe.compress.vtp.epochs if recipe.compress.neurons == "vtp" else 0,
        "recovery": recipe.finetune.epochs,
    }


def _expand(group: Group, references: Mapping[str, Reference], path: Path) -> list[Cell]:
    if group.reference and group.reference not in references:
        raise RecipeError(f"{path}: {group.name} starts from {group.reference!r}; known: {', '.join(references)}")
    usual, known = (0,), (0,)
    if group.reference:
        usual, known = references[group.reference].seeds, references[group.reference].all_seeds
    seeds = usual if group.seeds is None else group.seeds
    if not set(seeds) <= set(known):
        raise RecipeError(f"{path}: {group.name} wants seeds {seeds}; {group.reference} has {known}")
    cells = []
    for values in itertools.product(*group.grid.values()):
        tried = dict(zip(group.grid, values, strict=True))
        parts = [f"{_key(key)}{_word(value)}" for key, value in tried.items()]
        row = ".".join([group.name, *parts])
        for training, seed in itertools.product(group.training, seeds):
            name = f"{row}.{training}.{group.reference}_s{seed}" if group.reference else row
            settings = {**group.settings, **tried}
            cells.append(Cell(name, row, group.reference, seed, training, settings, tried, group.sweep, group.best))
    return cells


def _key(key: str) -> str:
    last = key.rpartition(".")[2]
    return f"{last}_" if last[-1].isdigit() else last


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "_on" if value else "_off"
    return f"_{value}".replace("%", "pct") if isinstance(value, str) else str(value)


def _put(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
