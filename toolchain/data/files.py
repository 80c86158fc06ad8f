"""Sources of image files, decoded when they are asked for: imagefolder, images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torchvision.datasets.folder import IMG_EXTENSIONS

from toolchain.data.base import Content
from toolchain.data.classes import numbers_of
from toolchain.data.folders import (
    Walk,
    by_split,
    class_folders,
    folders_in,
    layout_of,
    listed,
    masks_in,
    pictures_in,
    require_known,
)
from toolchain.data.pictures import Headers
from toolchain.data.splits import UNLABELLED
from toolchain.data.stored import PictureFiles, digested, header_notes, workers_of
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, fault_words
from toolchain.files import expanded


class ImageFolder:
    """One folder per class, below train/ with val/ or test/ beside it, or at the top, to be split here."""

    usage: ClassVar[str] = "imagefolder:PATH"
    names_classes: ClassVar[bool] = True

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """Labelled parts; raises DataError if a folder is missing, empty, or holds a file that is not an image."""
        root, walk = _folder(argument), Walk()
        folders, left_out = layout_of(root)
        classes, notes = class_folders(folders["train"])
        if len(classes) < 2 and wanted.classes is None:
            raise DataError(
                f"{folders['train']} has one class folder, {classes[0]!r}; expected at least two, or train/ and "
                f"val/ (or test/) with the class folders below. Unlabelled images are read by images:PATH. {' '.join(notes)}".rstrip()
            )
        for part, folder in folders.items():
            if part != "train":
                notes += class_folders(folder)[1]
                require_known(folder, classes)
        labels = numbers_of(classes, wanted.classes, str(folders["train"]))
        samples = {
            part: [(path, labels[name]) for name, below in folders_in(folder).items() for path in walk.pictures(below)]
            for part, folder in folders.items()
        }
        if empty := set(labels.values()) - {label for _, label in samples["train"]}:
            names = listed([name for name, label in labels.items() if label in empty])
            raise DataError(
                f"{folders['train']} has class folders without images: {names}; looked for {', '.join(IMG_EXTENSIONS)}"
            )
        return _content(root, samples, wanted, [*left_out, *notes, *walk.notes()], labels)


class ImageFiles:
    """All images below a folder, without labels; below train/ with val/ or test/ beside it, these are the splits."""

    usage: ClassVar[str] = "images:PATH"
    names_classes: ClassVar[bool] = False

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """Unlabelled parts; raises DataError if there is no image, or a file that is not one."""
        root, walk = _folder(argument), Walk()
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
        samples = {
            part: [(path, UNLABELLED) for path in sorted(walk.pictures(folder))] for part, folder in folders.items()
        }
        if missing := [part for part, pairs in samples.items() if not pairs]:
            raise DataError(
                f"{folders[missing[0]]} holds no image; looked for {', '.join(IMG_EXTENSIONS)}, also in its subfolders"
            )
        return _content(root, samples, wanted, [*notes, *walk.notes()])


def _content(
    root: Path,
    samples: Mapping[str, Sequence[tuple[Path, int]]],
    wanted: Wanted,
    notes: Sequence[str],
    classes: Mapping[str, int] | None = None,
) -> Content:
    """The content of files below a folder; raises DataError for one that is not an image.

    Args:
        root: the folder.
        samples: part → (file, label) of each.
        wanted: what is required of it.
        notes: what was left out, as sentences.
        classes: name of a class → its label; None where there are no labels.
    """
    preprocessing, headers = wanted.natural(), Headers()
    files = [path for pairs in samples.values() for path, _ in pairs]
    PictureFiles(files).check(headers)
    parts = {}
    for part, pairs in samples.items():
        paths = [path for path, _ in pairs]
        names = [path.relative_to(root).as_posix() for path in paths]
        parts[part] = PictureFiles(paths).images([n for _, n in pairs], preprocessing, workers_of(wanted), names)
    return Content(
        parts,
        preprocessing,
        digest_files(root, files),
        num_classes=None if classes is None else len(classes),
        class_names=classes or {},
        flip=True,
        notes=(*notes, *header_notes(headers, len(files), wanted, preprocessing)),
    )


def _top(root: Path) -> Path:
    """The folder that may hold splits: the root, or the only folder in it, as where pictures lie in images/ and labels beside it."""
    below = list(folders_in(root).values())
    return below[0] if len(below) == 1 and not pictures_in(root) else root


def _folder(argument: str) -> Path:
    root = expanded(argument)
    if not root.is_dir():
        why = f"{root} is a file" if root.exists() else f"there is no folder {root}"
        raise DataError(f"{why}; set data.source to the folder that the pictures lie in")
    return root


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
