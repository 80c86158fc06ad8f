"""Which tables of Hugging Face's `datasets` library a source names: of which data set, configuration and revision, and which columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from toolchain.data.folders import NAMES_READ, by_split, listed
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError

USAGE = "hf:NAME[:CONFIG][@REVISION]"
SAVED = ("dataset_dict.json", "state.json")
"""Files of a folder that `save_to_disk` wrote."""
CONFIGS = re.compile(r"(?:available configs:|not found\. Available:) \[(?P<names>.*?)\]", re.DOTALL)
"""Where the library's message has the configurations that there are."""


class Split(Protocol):
    """A table of the `datasets` library, as far as it is used here."""

    features: Mapping[str, object]

    def __len__(self) -> int: ...

    def __getitem__(self, row_or_column: int | str) -> Any: ...

    def with_format(self, kind: None) -> Any:
        """The same, whose cells are Python values."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a data set is: a folder or a name on the hub, and which configuration and revision of it; "" is the usual one."""

    name: str
    config: str = ""
    revision: str = ""

    @staticmethod
    def of(argument: str) -> Place:
        """What follows `hf:` in a recipe; the path of a folder that is there may have a colon or an @ in it.

        Raises:
            DataError: it is not written so, or asks of a folder what a folder has not.
        """
        if Path(argument).is_dir():
            return Place(argument)
        folder, _, config = argument.rpartition(":")
        if folder and config and Path(folder).is_dir():
            place = Place(folder, config)
        else:
            rest, at, revision = argument.partition("@")
            name, colon, config = rest.partition(":")
            if not name or bool(at) != bool(revision) or bool(colon) != bool(config):
                raise DataError(f"data source 'hf:{argument}' is written {USAGE}")
            place = Place(name, config, revision)
        if place.revision and Path(place.name).is_dir():
            raise DataError(f"hf:{argument} names a folder, which has no revisions: leave out @{place.revision}")
        if place.config and place.is_saved:
            raise DataError(
                f"hf:{argument} names a folder that save_to_disk wrote, which has no configurations: leave out :{place.config}"
            )
        return place

    @property
    def is_saved(self) -> bool:
        """Whether it is a folder that `save_to_disk` wrote."""
        return any((Path(self.name) / file).is_file() for file in SAVED)


def tables_of(argument: str) -> tuple[dict[str, Split], list[str]]:
    """(part → table, what was left out as sentences).

    Args:
        argument: what follows `hf:` in a recipe.

    Raises:
        DataError: they cannot be loaded, or which split is which is not clear; the message names what there is.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("hf: needs the package datasets. Try: pip install datasets") from error
    place = Place.of(argument)
    try:
        if place.is_saved:
            loaded = datasets.load_from_disk(place.name)
        else:
            loaded = datasets.load_dataset(place.name, place.config or None, revision=place.revision or None)
    except Exception as error:  # whatever the library and the readers below it make of a table or a network
        if (found := CONFIGS.search(str(error))) is not None:
            revision = f"@{place.revision}" if place.revision else ""
            names = found["names"].replace("'", "")
            wrong = f"has no configuration {place.config!r}" if place.config else "has several configurations"
            raise DataError(
                f"hf:{argument} {wrong}: name one of {names} as hf:{place.name}:CONFIG{revision}"
            ) from error
        why = error.__cause__ or error
        raise DataError(f"cannot load hf:{argument}: {type(why).__name__} {why}".rstrip()) from error
    tables = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    if len(tables) == 1:  # the only split there is gets split here
        return {"train": next(iter(tables.values()))}, []
    names = by_split(tables, f"hf:{argument}")
    if "train" not in names:
        raise DataError(
            f"hf:{argument} has the splits {', '.join(tables)}; expected 'train' among them, or only one. "
            f"Names that are read: {NAMES_READ}."
        )
    others = [each for each in tables if each not in names.values()]
    notes = [f"Beside the splits that are read, these were left out: {listed(others)}."] if others else []
    return {part: tables[each] for part, each in names.items()}, notes


def columns_of(argument: str, features: Mapping[str, object], wanted: Wanted) -> tuple[str, str | None]:
    """(the image column, the label column or None) of a table.

    Args:
        argument: what follows `hf:` in a recipe.
        features: column → what it holds.
        wanted: names a column where several could be meant; a label column "" is none.

    Raises:
        DataError: there is no such column, or it is not clear which; the message names those that there are.
    """
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    shown = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
    images = [column for column, kind in kinds.items() if kind == "Image"]
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    labels = [column for column in kinds if column in ("label", "labels")] or classes
    if not images:
        raise DataError(
            f"hf:{argument} has the columns {shown}; expected one Image among them. If one holds the bytes or paths of pictures, save "
            "the data set with table.cast_column(…, datasets.Image())"
        )
    image = _chosen(argument, "image", wanted.image_column, images, images)
    if wanted.label_column == "" or (wanted.label_column is None and not labels):
        return image, None
    return image, _chosen(argument, "label", wanted.label_column, labels, [each for each in kinds if each != image])


def unread_labels(features: Mapping[str, object], image: str) -> list[str]:
    """A sentence on columns that could be labels, where none was read and none was asked for."""
    kinds = {column: str(getattr(feature, "dtype", "")) for column, feature in features.items() if column != image}
    likely = ("int", "uint", "bool", "string", "large_string")
    possible = [name for name, kind in kinds.items() if kind.startswith(likely) and not name.startswith("__")]
    note = (
        "No labels are read, since no column is called label or labels or holds classes: data.label_column (--label-column) "
        f"names one, if it is among {', '.join(possible)}."
    )
    return [note] if possible else []


def _chosen(argument: str, what: str, asked: str | None, usual: list[str], possible: list[str]) -> str:
    """The column that is asked for, else the only usual one; raises DataError."""
    if asked is not None:
        if asked not in possible:
            raise DataError(
                f"hf:{argument} has no column {asked!r} of {what}s; set data.{what}_column (--{what}-column) to one of {', '.join(possible)}"
            )
        return asked
    if len(usual) > 1:
        none = ", or to '' to read none" if what == "label" else ""
        raise DataError(
            f"hf:{argument} has several columns of {what}s: set data.{what}_column (--{what}-column) to one of {', '.join(usual)}{none}"
        )
    return usual[0]
