"""Sources of natural images, decoded when they are asked for: imagefolder, images, hf."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from toolchain.data.base import Content
from toolchain.data.splits import UNLABELLED, Images
from toolchain.data.transforms import Preprocessing, Wanted
from toolchain.errors import DataError

Part = TypeVar("Part")
HEADERS_CHECKED = 1000
DIGESTED_BYTES = 4096  # of each end of a file
MOST_WORKERS = 8
HELD_OUT_NAMES = {"validation": ("val", "validation", "valid"), "test": ("test",)}


class ImageFolder:
    """One folder per class, below train/ with val/ or test/ beside it, or at the top, to be split here."""

    usage: ClassVar[str] = "imagefolder:PATH"

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """Labelled parts; raises DataError if a folder is missing, empty, or holds a file that is not an image."""
        root, preprocessing = _folder(argument), wanted.natural()
        held_out = _held_out({path.name: path for path in root.iterdir() if path.is_dir()})
        folders = {"train": root / "train", **held_out} if (root / "train").is_dir() else {"train": root}
        try:
            _, classes = find_classes(folders["train"])
            samples = {
                part: make_dataset(folder, classes, IMG_EXTENSIONS, allow_empty=part != "train")
                for part, folder in folders.items()
            }
        except FileNotFoundError as error:
            raise DataError(f"imagefolder {root}: {error}") from error
        if len(classes) < 2:
            raise DataError(
                f"{folders['train']} has one class folder, {next(iter(classes))!r}; expected at least two, or train/ "
                "and val/ (or test/) with the class folders below. Unlabelled images are read by images:PATH."
            )
        for folder in folders.values():
            if unknown := sorted(set(find_classes(folder)[0]) - set(classes)):
                raise DataError(f"{folder} has class folders that train/ lacks: {', '.join(unknown[:5])}")
        files = [Path(path) for part in samples.values() for path, _ in part]
        _check_headers(files)
        parts = {
            part: Images(
                partial(_load, preprocessing, [Path(path) for path, _ in found]),
                [label for _, label in found],
                workers=_workers(),
            )
            for part, found in samples.items()
        }
        return Content(parts, preprocessing, _digest_files(root, files), num_classes=len(classes), flip=True)


class ImageFiles:
    """All images below a folder, without labels."""

    usage: ClassVar[str] = "images:PATH"

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """One unlabelled part; raises DataError if there is no image, or a file that is not one."""
        root, preprocessing = _folder(argument), wanted.natural()
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
        if not files:
            raise DataError(f"{root} holds no image; looked for {', '.join(IMG_EXTENSIONS)}, also in its subfolders")
        _check_headers(files)
        images = Images(partial(_load, preprocessing, files), [UNLABELLED] * len(files), workers=_workers())
        return Content({"train": images}, preprocessing, _digest_files(root, files), flip=True)


class HuggingFace:
    """A data set of the `datasets` library: one saved to a local folder, or a name on the hub."""

    usage: ClassVar[str] = "hf:NAME"

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """The splits that there are; raises DataError if they cannot be loaded or the columns are not clear."""
        preprocessing = wanted.natural()
        tables = self._load(argument)
        first = next(iter(tables.values()))
        image_column, label_column = _columns(argument, first.features)
        digest = hashlib.sha256()
        parts = {}
        for part, table in tables.items():
            labels = table[label_column] if label_column else [UNLABELLED] * len(table)
            load = partial(_load_row, preprocessing, table, image_column)
            parts[part] = Images(load, list(labels), workers=_workers())
            digest.update(f"{part} {table._fingerprint}\n".encode())  # noqa: SLF001 - the library's own content hash
        if label_column and min(int(images.labels.min()) for images in parts.values()) < 0:
            raise DataError(f"hf:{argument} has rows without a label in {label_column!r} (−1); drop them first")
        return Content(parts, preprocessing, digest.hexdigest(), _num_classes(first, label_column, parts), flip=True)

    @staticmethod
    def _load(name: str) -> dict[str, Any]:
        """Split name → table, with the names that `arrange` knows."""
        try:
            import datasets
        except ImportError as error:
            raise DataError("hf: needs the package datasets. Try: pip install datasets") from error
        is_saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
        try:
            loaded = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"cannot load hf:{name}: {error}") from error
        tables = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
        if "train" in tables:
            return {"train": tables["train"], **_held_out(tables)}
        if len(tables) == 1:  # the only split there is gets split here
            return {"train": next(iter(tables.values()))}
        raise DataError(f"hf:{name} has the splits {', '.join(tables)}; expected 'train' among them, or only one")


def _held_out(found: Mapping[str, Part]) -> dict[str, Part]:
    """The parts "validation" and "test", as far as they are there under one of their usual names."""
    matches = ((part, name) for part, names in HELD_OUT_NAMES.items() for name in names if name in found)
    return {part: found[name] for part, name in reversed(list(matches))}


def _columns(name: str, features: Mapping[str, Any]) -> tuple[str, str | None]:
    """(the image column, the label column or None) of a table; raises DataError if it is not clear which."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    classes = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    labels = [column for column in ("label", "labels") if column in kinds] or classes
    if len(images) != 1 or len(labels) > 1:
        shown = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise DataError(f"hf:{name} has the columns {shown}; expected one Image and at most one label column")
    return images[0], labels[0] if labels else None


def _num_classes(table: Any, label_column: str | None, parts: Mapping[str, Images]) -> int | None:
    if label_column is None:
        return None
    declared = getattr(table.features[label_column], "num_classes", None)
    return int(declared) if declared else 1 + max(int(images.labels.max()) for images in parts.values())


def _load(preprocessing: Preprocessing, files: Sequence[Path], position: int) -> Tensor:
    return preprocessing.of_file(files[position])


def _load_row(preprocessing: Preprocessing, table: Any, column: str, position: int) -> Tensor:
    return preprocessing.of_picture(table[position][column])


def _folder(argument: str) -> Path:
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    return root


def _check_headers(files: Sequence[Path]) -> None:
    """Raises DataError for a file that is not an image, among all files or, of many, an even sample."""
    for path in files[:: 1 + len(files) // HEADERS_CHECKED]:
        try:
            with Image.open(path):
                pass
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image {path}: {error}. Remove or replace the file.") from error


def _digest_files(root: Path, files: Iterable[Path]) -> str:
    """sha256 over the relative path, size, first and last 4 KiB of every file; neither what lies between nor times count.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(DIGESTED_BYTES)
                file.seek(max(len(head), size - DIGESTED_BYTES))
                tail = file.read(DIGESTED_BYTES)
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from error
        digest.update(f"{path.relative_to(root).as_posix()} {size}\n".encode() + head + tail)
    return digest.hexdigest()


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)
