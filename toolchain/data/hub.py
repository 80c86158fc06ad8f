"""Sources of Hugging Face's `datasets` library, decoded when they are asked for: hf."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from PIL import Image

from toolchain.data.base import Content
from toolchain.data.classes import numbers_of
from toolchain.data.pictures import Headers, eight_bit
from toolchain.data.splits import UNLABELLED, Images
from toolchain.data.stored import Pictures, digested, header_notes, workers_of
from toolchain.data.tables import USAGE, Split, columns_of, tables_of, unread_labels
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, fault_words

ROWS = 1000
"""Rows that are held at once."""


class HuggingFace:
    """A data set of the `datasets` library: a local folder, or a name on the hub."""

    usage: ClassVar[str] = USAGE
    names_classes: ClassVar[bool] = True
    has_columns: ClassVar[bool] = True

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """The splits that there are; raises DataError if they cannot be loaded or the columns are not clear."""
        preprocessing = wanted.natural(turned=True)  # as `datasets` does by itself
        tables, notes = tables_of(argument)
        first = tables["train"]
        image_column, label_column = columns_of(argument, first.features, wanted)
        if label_column is None and wanted.label_column is None:
            notes += unread_labels(first.features, image_column)
        numbers = _numbers(argument, tables, label_column, wanted)
        digest, headers = hashlib.sha256(f"{image_column}\n".encode() if wanted.image_column else b""), Headers()
        parts = {}
        for part, table in tables.items():
            labels = [UNLABELLED] * len(table)
            if label_column:
                labels = _labels(argument, part, table, label_column, numbers)
                if part == "test" and set(labels) == {UNLABELLED}:
                    notes.append(f"The split test has no labels in {label_column!r}, so it was left out.")
                    continue
                if UNLABELLED in labels:
                    raise DataError(f"hf:{argument} has rows without a label in {label_column!r} (−1); drop them first")
            rows = Rows(argument, part, table, image_column)
            rows.check(headers)
            parts[part] = rows.images(labels, preprocessing, workers_of(wanted))
            digest.update(f"{part} ".encode())
            for told in rows.told():
                digest.update(told)
        return Content(
            parts,
            preprocessing,
            digest.hexdigest(),
            None if label_column is None else _num_classes(first, label_column, parts),
            flip=True,
            class_names=_class_names(first, label_column, numbers),
            notes=(*notes, *header_notes(headers, sum(map(len, tables.values())), wanted, preprocessing)),
        )


class Rows(Pictures):
    """The encoded pictures of a table: the library would decode, turn and convert them by itself."""

    def __init__(self, name: str, part: str, table: Split, column: str) -> None:
        import datasets

        self._name, self._column = f"hf:{name} {part}", column
        mode = getattr(table.features[column], "mode", None)
        self._mode: Literal["L", "RGB"] | None = mode if mode in ("L", "RGB") else None
        if mode not in (None, "L", "RGB"):
            raise DataError(f"hf:{name} declares its images as of mode {mode!r}; only 'L' and 'RGB' are read")
        self._table = table.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._table)

    def named(self, position: int) -> str:
        return f"in row {position} of {self._name}"

    def open(self, position: int) -> Image.Image:
        value = self._table[position][self._column]
        if not value or not (value["bytes"] or value["path"]):
            raise ValueError("the row has no image")
        return Image.open(io.BytesIO(value["bytes"]) if value["bytes"] else value["path"])

    def as_declared(self, picture: Image.Image, *, turn: bool) -> Image.Image:
        return picture if self._mode is None else eight_bit(picture, self._mode, turn=turn)

    def told(self) -> Iterator[bytes]:
        """What tells the pictures of all rows from others, which the library's own fingerprint may not: it can be that of their paths.

        Raises:
            DataError: a picture that lies beside the table cannot be read.
        """
        from pyarrow import BufferReader

        yield f"{len(self)} {self._mode}\n".encode()
        for batch in self._table.with_format("arrow").iter(batch_size=ROWS):
            for value in batch.column(self._column):
                stored, path = (value["bytes"].as_buffer(), value["path"].as_py()) if value.is_valid else (None, None)
                try:
                    with Path(path).open("rb") if stored is None and path else BufferReader(stored or b"") as file:
                        yield digested(file)
                except OSError as error:
                    raise DataError(f"cannot read the image {path} of {self._name}: {fault_words(error)}") from error


def _numbers(name: str, tables: Mapping[str, Split], column: str | None, wanted: Wanted) -> list[int] | None:
    """The label of each class by its place in the table, None where that is the label.

    Raises:
        DataError: the labels are no classes, differ between splits, or are not what `data.classes` names.
    """
    if column is None:
        if wanted.classes is not None:
            raise DataError(f"hf:{name} has no label column, but data.classes is set; remove it")
        return None
    kinds = {str(table.features[column]) for table in tables.values()}
    if len(kinds) > 1:
        raise DataError(
            f"hf:{name} has other classes in {column!r} of one split than of another: {'; '.join(sorted(kinds))}"
        )
    feature = tables["train"].features[column]
    names = getattr(feature, "names", None)
    if names is None and not str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool")):
        raise DataError(
            f"hf:{name} has labels of type {feature} in {column!r}; expected ClassLabel or whole numbers. "
            "Encode texts by table.class_encode_column(…), or read no labels with data.label_column = ''"
        )
    if wanted.classes is None:
        return None
    if names is None:
        raise DataError(f"hf:{name} has numbers in {column!r} and no class names, which data.classes maps; remove it")
    return list(numbers_of(names, wanted.classes, f"the classes of {column!r}").values())


def _labels(name: str, part: str, table: Split, column: str, numbers: list[int] | None) -> list[int]:
    """The labels of a table, −1 where there is none; raises DataError for a number that is no class."""
    labels = [UNLABELLED if label is None else int(label) for label in table[column]]
    if numbers is not None:
        labels = [numbers[label] if label >= 0 else label for label in labels]
    if labels and min(labels) < UNLABELLED:
        raise DataError(f"hf:{name} has the label {min(labels)} in {column!r} of {part}; classes are numbered from 0")
    return labels


def _class_names(table: Split, column: str | None, numbers: list[int] | None) -> dict[str, int]:
    names = getattr(table.features[column], "names", None) if column else None
    return dict(zip(names or (), numbers or range(len(names or ())), strict=True))


def _num_classes(table: Split, column: str, parts: Mapping[str, Images]) -> int:
    if declared := getattr(table.features[column], "num_classes", None):
        return int(declared)
    return 1 + max(int(images.labels.max()) for images in parts.values() if len(images))
