"""Pictures that lie in files or in the rows of a table, and are decoded when they are asked for."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from PIL import Image
from torch import Tensor

from toolchain.data.glances import Glances, glance
from toolchain.data.pictures import BAD_FILE, Headers
from toolchain.data.splits import Images
from toolchain.data.transforms import Preprocessing, Wanted
from toolchain.errors import DataError
from toolchain.on_device.runner import usable_cores

HEADERS_CHECKED = 1000
DIGESTED_BYTES = 4096  # of each end of a file
UNCOMPRESSED = (b"BM", b"P", b"II", b"MM")
"""First bytes of files whose size need not change with their pixels: BMP, PNM and its kin, TIFF and BigTIFF."""
MOST_WORKERS = 8


def unreadable(name: str, error: Exception) -> DataError:
    """What to raise for an image that cannot be read."""
    return DataError(f"cannot read the image {name}: {str(error).rstrip('.')}. Remove or replace the file.")


class Pictures(ABC):
    """Stored pictures, by their positions."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, position: int) -> Image.Image:
        """A picture, opened; raises what Pillow raises."""

    @abstractmethod
    def named(self, position: int) -> str:
        """The name of a picture in messages."""

    def as_declared(self, picture: Image.Image, *, turn: bool) -> Image.Image:  # noqa: ARG002
        """An opened picture in the mode that its place declares, if it declares one; raises ValueError."""
        return picture

    def check(self, headers: Headers) -> None:
        """Counts what headers tell of all pictures or, of many, of an even sample; raises DataError for one that is none."""
        for position in range(0, len(self), 1 + len(self) // HEADERS_CHECKED):
            try:
                with self.open(position) as picture:
                    headers.add(picture)
            except BAD_FILE as error:
                raise unreadable(self.named(position), error) from error

    def images(
        self, labels: Sequence[int], preprocessing: Preprocessing, workers: int = 0, paths: Sequence[str] = ()
    ) -> Images:
        """The images with their labels, told apart by glances and, where they have any, by their paths."""
        glances = Glances(partial(self._glance, preprocessing.exif_orientation), paths)
        load = partial(self._pixels, preprocessing)
        return Images(load, labels, workers=workers, finish=preprocessing.of_pixels, glances=glances)

    def _pixels(self, preprocessing: Preprocessing, position: int) -> Tensor:
        try:
            with self.open(position) as picture:
                return preprocessing.pixels_of(self.as_declared(picture, turn=preprocessing.exif_orientation))
        except BAD_FILE as error:
            raise unreadable(self.named(position), error) from error

    def _glance(self, turn: bool, position: int) -> Tensor | None:
        return glance(partial(self.open, position), turn=turn)


class PictureFiles(Pictures):
    """Files of pictures."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, position: int) -> Image.Image:
        return Image.open(self._paths[position])

    def named(self, position: int) -> str:
        return str(self._paths[position])


def header_notes(headers: Headers, total: int, wanted: Wanted, preprocessing: Preprocessing) -> list[str]:
    """What headers tell of `total` pictures, as sentences, for this model and these keys of the recipe."""
    turned, channels = preprocessing.exif_orientation, preprocessing.input_size[0]
    return headers.notes(total, wanted.exif_orientation, turned=turned, channels=channels)


def digested(file: IO[bytes]) -> bytes:
    """What tells a picture's file from others: its size and its ends, of one that may be uncompressed all of it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(DIGESTED_BYTES)
    if head.startswith(UNCOMPRESSED):
        return f" {size}\n".encode() + head + file.read()
    file.seek(max(len(head), size - DIGESTED_BYTES))
    return f" {size}\n".encode() + head + file.read(DIGESTED_BYTES)


def workers_of(wanted: Wanted) -> int:
    """How many threads decode: what the recipe says, else one for each usable core, up to `MOST_WORKERS`."""
    return min(MOST_WORKERS, usable_cores()) if wanted.workers is None else wanted.workers
