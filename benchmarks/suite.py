"""A suite in TOML → typed cells of every kind, and the dense models that some of them start from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kinds import KINDS
from kinds.base import Cell, Table
from pydantic import Field, ValidationError

from toolchain.errors import RecipeError
from toolchain.recipe import Recipe
from toolchain.settings import explain, read_toml

HERE = Path(__file__).resolve().parent
SUITES = HERE / "suites"


class Model(Table):
    """A timm model by the short name that cells have for it.

    Attributes:
        name: timm's.
        macs: multiply-accumulates of one image, rounded; they say how long measuring takes.
    """

    name: str
    macs: float


class Reference(Table):
    """A dense model that is trained once for each seed; `more_seeds` are for the groups that name them."""

    seeds: tuple[int, ...] = Field(min_length=1)
    more_seeds: tuple[int, ...] = ()
    recipe: dict[str, Any]

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Every seed that a group may name."""
        return self.seeds + self.more_seeds


class File(Table):
    """A suite as it stands in its file.

    Attributes:
        title, text: what its page begins with.
        kind: of the groups that name none.
        page: which page is made of its records.
        references: dense models by name.
        recovery: the [finetune] of the cells that are trained after.
        models: timm models by the names that cells have for them.
        forms: recipe sections by the name of what they make of a model.
        compare: pairs of rows that the page holds against each other.
        cells: groups of cells; their keys are those of their kind.
    """

    title: str
    text: str = ""
    kind: str = "compression"
    page: str = "accuracy"
    references: dict[str, Reference] = Field(default_factory=dict)
    recovery: dict[str, Any] = Field(default_factory=dict)
    models: dict[str, Model] = Field(default_factory=dict)
    forms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    compare: tuple[tuple[str, str], ...] = ()
    cells: tuple[dict[str, Any], ...] = Field(min_length=1)


@dataclass(frozen=True)
class Suite:
    """Everything that a suite's file says."""

    name: str
    path: Path
    file: File
    cells: tuple[Cell, ...]
    sweeps: dict[str, tuple[Cell, ...]] = field(default_factory=dict)

    @staticmethod
    def load(path: Path) -> Suite:
        """The suite of a file, or of a name in `suites/`, all its names resolved.

        Raises:
            StorageError: the file cannot be read.
            RecipeError: it contradicts itself.
        """
        path = path if path.suffix else SUITES / f"{path}.toml"
        raw = read_toml(path, "the suite ")
        try:
            file = File.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(f"{path}: {explain(error, File, 'suite')}") from None
        cells: list[Cell] = []
        for number, group in enumerate(file.cells):
            kind = KINDS.require(group.get("kind", file.kind))
            own = {key: value for key, value in group.items() if key != "kind"}
            try:
                cells += kind.cells(kind.group.model_validate(own), file, path)
            except ValidationError as error:
                raise RecipeError(f"{path}: {explain(error, kind.group, f'cells[{number}]')}") from None
        cells.sort(key=lambda cell: cell.place)
        names = [cell.name for cell in cells]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(f"{path} has two cells {doubled[0]!r}; give one of their groups another name")
        sweeps = {c.sweep: tuple(o for o in cells if o.sweep == c.sweep) for c in cells if c.sweep}
        suite = Suite(path.stem, path, file, tuple(cells), sweeps)
        for cell in cells:
            KINDS[cell.kind].check(cell, suite)
        rows = {cell.row for cell in cells}
        for row in (row for pair in file.compare for row in pair):
            if row not in rows:
                raise RecipeError(f"{path} compares {row!r}, which is no row; known: {', '.join(sorted(rows))}")
        return suite

    def reference_recipe(self, reference: str, seed: int) -> Recipe:
        """The recipe that a dense model is trained by."""
        raw = copy.deepcopy(self.file.references[reference].recipe)
        raw["compress"] = {"method": "none", "seed": seed}
        return Recipe.from_dict(raw)
