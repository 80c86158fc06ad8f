"""Sources of image files, decoded when they are asked for: imagefolder, images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, ClassVar

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from toolchain.data.base import Content
from toolchain.data.classes import numbers_of
from toolchain.data.folders import (
    Layout,
    Walk,
    by_split,
    class_folders,
    folders_in,
    listed,
    masks_in,
    pictures_in,
    require_known,
)
from toolchain.data.glances import Glances, glance
from toolchain.data.pictures import BAD_FILE, Headers
from toolchain.data.splits import UNLABELLED, Images
from toolchain.data.transforms import Preprocessing, Wanted, unreadable
from toolchain.errors import DataError, fault_words
from toolchain.files import expanded
from toolchain.on_device.runner import usable_cores

HEADERS_CHECKED = 1000
DIGESTED_BYTES = 4096  # of each end of a file
UNCOMPRESSED = (b"BM", b"P", b"II", b"MM")
"""First bytes of files whose size need not change with their pixels: BMP, PNM and its kin, TIFF and BigTIFF."""
MOST_WORKERS = 8


class ImageFolder:
    """One folder per class, below train/ with val/ or test/ beside it, or at the top, to be split here."""

    usage: ClassVar[str] = "imagefolder:PATH"
    names_classes: ClassVar[bool] = True

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """Labelled parts; raises DataError if a folder is missing, empty, or holds a file that is not an image."""
        root, preprocessing, walk = _folder(argument), wanted.natural(), Walk()
        layout = Layout.of(root)
        classes, notes = class_folders(layout.folders["train"])
        if len(classes) < 2 and wanted.classes is None:
            raise DataError(
                f"{layout.folders['train']} has one class folder, {classes[0]!r}; expected at least two, or train/ and "
                f"val/ (or test/) with the class folders below. Unlabelled images are read by images:PATH. {' '.join(notes)}".rstrip()
            )
        for part, folder in layout.folders.items():
            if part != "train":
                notes += class_folders(folder)[1]
                require_known(folder, classes)
        labels = numbers_of(classes, wanted.classes, str(layout.folders["train"]))
        samples = {
            part: [(path, labels[name]) for name, below in folders_in(folder).items() for path in walk.pictures(below)]
            for part, folder in layout.folders.items()
        }
        if empty := set(labels.values()) - {label for _, label in samples["train"]}:
            names = listed([name for name, label in labels.items() if label in empty])
            raise DataError(
                f"{layout.folders['train']} has class folders without images: {names}; "
                f"looked for {', '.join(IMG_EXTENSIONS)}"
            )
        files = [path for part in samples.values() for path, _ in part]
        headers = _checked(files)
        parts = {
            part: _images(root, preprocessing, [path for path, _ in pairs], [label for _, label in pairs], wanted)
            for part, pairs in samples.items()
        }
        return Content(
            parts,
            preprocessing,
            digest_files(root, files),
            num_classes=len(classes),
            class_names=labels,
            flip=True,
            notes=(
                *layout.notes,
                *notes,
                *walk.notes(),
                *header_notes(headers, len(files), wanted, preprocessing),
            ),
        )


class ImageFiles:
    """All images below a folder, without labels; below train/ with val/ or test/ beside it, these are the splits."""

    usage: ClassVar[str] = "images:PATH"
    names_classes: ClassVar[bool] = False

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """Unlabelled parts; raises DataError if there is no image, or a file that is not one."""
        root, preprocessing, walk = _folder(argument), wanted.natural(), Walk()
        top, notes = _top(root), list[str]()
        walk.masks |= masks_in(root)
        tops = folders_in(top)
        names = by_split(tops, str(top))
        folders = {"train": root}
        if "train" in names and len(names) > 1:
            folders = {part: tops[name] for part, name in names.items()}
            if others := {name for name in tops if name not in names.values()}:
                notes.append(f"Beside the splits, these folders were left out: {listed(others)}.")
            if strays := len(pictures_in(top)):
                notes.append(f"Left out, since in no split: {strays} images in {top.name}/.")
        found = {part: sorted(walk.pictures(folder)) for part, folder in folders.items()}
        if missing := [part for part, files in found.items() if not files]:
            raise DataError(
                f"{folders[missing[0]]} holds no image; looked for {', '.join(IMG_EXTENSIONS)}, also in its subfolders"
            )
        files = [path for part in found.values() for path in part]
        headers = _checked(files)
        parts = {
            part: _images(root, preprocessing, paths, [UNLABELLED] * len(paths), wanted)
            for part, paths in found.items()
        }
        return Content(
            parts,
            preprocessing,
            digest_files(root, files),
            flip=True,
            notes=(
                *notes,
                *walk.notes(),
                *header_notes(headers, len(files), wanted, preprocessing),
            ),
        )


def _top(root: Path) -> Path:
    """The folder that may hold splits: the root, or the only folder in it, as where pictures lie in images/ and labels beside it."""
    below = list(folders_in(root).values())
    return below[0] if len(below) == 1 and not pictures_in(root) else root


def _images(
    root: Path, preprocessing: Preprocessing, files: Sequence[Path], labels: Sequence[int], wanted: Wanted
) -> Images:
    load = partial(_load, preprocessing, files)
    glances = Glances(
        partial(_glance, files, preprocessing.exif_orientation), [path.relative_to(root).as_posix() for path in files]
    )
    return Images(load, labels, workers=workers(wanted), finish=preprocessing.of_pixels, glances=glances)


def _load(preprocessing: Preprocessing, files: Sequence[Path], position: int) -> Tensor:
    return preprocessing.pixels_of_file(files[position])


def _glance(files: Sequence[Path], turn: bool, position: int) -> Tensor | None:
    return glance(lambda: Image.open(files[position]), turn=turn)


def _folder(argument: str) -> Path:
    root = expanded(argument)
    if not root.is_dir():
        why = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise DataError(f"{why}; set data.source to the folder that the pictures lie in")
    return root


def sample(count: int) -> range:
    """The positions of an even sample whose headers are checked, or of all."""
    return range(0, count, 1 + count // HEADERS_CHECKED)


def _checked(files: Sequence[Path]) -> Headers:
    """What headers tell of all files or, of many, an even sample; raises DataError for one that is not an image."""
    headers = Headers()
    for position in sample(len(files)):
        try:
            with Image.open(files[position]) as picture:
                headers.add(picture)
        except BAD_FILE as error:
            raise unreadable(str(files[position]), error) from error
    return headers


def header_notes(headers: Headers, total: int, wanted: Wanted, preprocessing: Preprocessing) -> list[str]:
    """What headers tell of `total` pictures, as sentences, for this model and these keys of the recipe."""
    turned, channels = preprocessing.exif_orientation, preprocessing.input_size[0]
    return headers.notes(total, wanted.exif_orientation, turned=turned, channels=channels)


def digest_files(root: Path, files: Iterable[Path]) -> str:
    """sha256 over the relative path, size, first and last 4 KiB of every file, and all of one that may be uncompressed.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        try:
            with path.open("rb") as file:
                told = digested(file)
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {fault_words(error)}") from error
        name = os.fsencode(path.relative_to(root).as_posix())  # which need not be UTF-8
        digest.update(name + told)
    return digest.hexdigest()


def digested(file: IO[bytes]) -> bytes:
    """What tells a picture's file from others: its size and its ends, of one that may be uncompressed all of it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(DIGESTED_BYTES)
    if head.startswith(UNCOMPRESSED):
        return f" {size}\n".encode() + head + file.read()
    file.seek(max(len(head), size - DIGESTED_BYTES))
    return f" {size}\n".encode() + head + file.read(DIGESTED_BYTES)


def workers(wanted: Wanted) -> int:
    """How many threads decode: what the recipe says, else one for each usable core, up to `MOST_WORKERS`."""
    if wanted.workers is not None:
        return wanted.workers
    return min(MOST_WORKERS, usable_cores())
