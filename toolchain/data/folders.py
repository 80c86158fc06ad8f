"""Finds the pictures of a data set, and the folder of each split."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS

from toolchain.errors import DataError, fault_words

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
WEAKER = ("dev", "eval")
"""Names of validation that give way to its others."""
LIKE_SPLITS = re.compile(r"(?<![a-z])(train|val|test|dev|eval)", re.IGNORECASE)
"""Words by which a folder's name looks like a split, as in "train_images" or "seg_test"."""
COLLECTIONS = frozenset({"images", "image", "imgs", "img", "pictures", "photos", "rgb", "jpg", "jpeg", "png", "data"})
"""Names of a folder of pictures within a class or an unlabelled test set: they tell of no class."""
ANNOTATIONS = re.compile(r"(?<![a-z])(mask|label|annotation|segmentation|ground.?truth|depth)|^gt", re.IGNORECASE)
"""Names of a folder that holds what is known of pictures, if a folder of pictures lies beside it."""
NAMES_READ = "train or training; val, valid, validation, dev or eval; test or testing; in any case"
NO_DATA = frozenset(  # what systems and programs leave in folders, besides names that begin with a dot
    {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
)
PICTURES_NOT_READ = frozenset(
    [".avif", ".dcm", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".npy", ".svg", ".tga"]
)
NAMED = 5  # so many names are listed in a message


def is_data(name: str) -> bool:
    """Whether a file or folder of that name can be data, and is not hidden or a system's own."""
    return not name.startswith(".") and name.casefold() not in NO_DATA


def is_picture(name: str) -> bool:
    """Whether a file of that name is read as a picture."""
    return is_data(name) and name.lower().endswith(IMG_EXTENSIONS)


def by_split(names: Iterable[str], where: str) -> dict[str, str]:
    """Split ("train", "validation", "test") → the name that stands for it.

    Of validation's names, "dev" and "eval" give way to the others.

    Raises:
        DataError: there is a train, and two names stand for one split; `where` begins the message.
    """
    candidates = _candidates(names)
    for split, several in candidates.items():
        if len(several) > 1 and "train" in candidates:
            raise DataError(f"{where} has {listed(several)}, which all stand for {split}; keep one of them")
    return {split: candidates[split][0] for split in SPLIT_NAMES if split in candidates}


def _candidates(names: Iterable[str]) -> dict[str, list[str]]:
    """Split → the names that could stand for it."""
    candidates: dict[str, list[str]] = {}
    for name in sorted(names):
        for split, known in SPLIT_NAMES.items():
            if name.casefold() in known:
                candidates.setdefault(split, []).append(name)
    for split, several in candidates.items():
        candidates[split] = [name for name in several if name.casefold() not in WEAKER] or several
    return candidates


def listed(names: Collection[str]) -> str:
    """The names, of many the first ones, for a message."""
    shown = ", ".join(sorted(names)[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def folders_in(folder: Path) -> dict[str, Path]:
    """Name → path of the folders directly in a folder that can be data, sorted by name, without annotations; raises DataError."""
    found = {path.name: path for path in _entries(folder) if path.is_dir() and is_data(path.name)}
    left = masks_among(found)
    return {name: path for name, path in found.items() if name not in left}


def masks_in(folder: Path) -> set[str]:
    """The names of folders of masks or labels directly in a folder, beside its pictures; raises DataError."""
    return masks_among(path.name for path in _entries(folder) if path.is_dir() and is_data(path.name))


def masks_among(names: Iterable[str]) -> set[str]:
    """Those of the folders in one place that hold masks or labels for the pictures in another of them."""
    called = {name: bool(ANNOTATIONS.search(name)) for name in names}
    beside = any(
        name.casefold() in COLLECTIONS or re.search("image|img", name, re.IGNORECASE)
        for name, annotates in called.items()
        if not annotates
    )
    return {name for name, annotates in called.items() if annotates and beside}


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder, sorted by name; raises DataError."""
    return [path for path in _entries(folder) if is_picture(path.name) and not path.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {fault_words(error)}") from error


@dataclass
class Walk:
    """Goes through folders for pictures, and counts the endings of those that are not read.

    Attributes:
        endings: lower-case ending → number of files.
        masks: names of folders of masks or labels, which lie beside the pictures.
    """

    endings: Counter[str] = field(default_factory=Counter)
    masks: set[str] = field(default_factory=set)

    def pictures(self, folder: Path) -> list[Path]:
        """The pictures below a folder, at any depth, sorted by folder and name; links are followed, but never in a ring.

        Raises:
            DataError: a folder cannot be read.
        """
        pictures = []
        try:
            places = sorted(_walk(folder, self.masks))
        except OSError as error:
            raise DataError(f"cannot read the folder {error.filename}: {fault_words(error)}") from error
        for root, names in places:
            for name in sorted(filter(is_data, names)):
                if is_picture(name):
                    if _is_file(Path(root, name)):
                        pictures.append(Path(root, name))
                elif (ending := os.path.splitext(name)[1].lower()) in PICTURES_NOT_READ:  # noqa: PTH122
                    self.endings[ending] += 1
        return pictures

    def notes(self) -> list[str]:
        """One sentence for each kind of file that was left out."""
        notes = mask_notes(self.masks)
        if self.endings:
            shown = ", ".join(f"{ending} ({count})" for ending, count in sorted(self.endings.items()))
            notes.append(f"Files with these endings were left out: {shown}; read are {', '.join(IMG_EXTENSIONS)}.")
        return notes


def mask_notes(names: Collection[str]) -> list[str]:
    """One sentence on folders of masks or labels that were left out, if there are any."""
    return [f"Left out, since they hold masks or labels of the pictures beside them: {listed(names)}."] if names else []


def _walk(folder: Path, left: set[str]) -> Iterator[tuple[str, list[str]]]:
    def failed(error: OSError) -> None:
        raise error

    # A link that leads back up would bring in what lies beside the folder: the pictures of other classes.
    above = [place.stat() for place in (folder.resolve(), *folder.resolve().parents)]
    seen = {(place.st_dev, place.st_ino) for place in above}
    for root, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        kept, skipped = [], masks_among(filter(is_data, folders))
        left |= skipped
        for name in sorted({*filter(is_data, folders)} - skipped):
            place = Path(root, name).stat()
            if (identity := (place.st_dev, place.st_ino)) not in seen:
                seen.add(identity)
                kept.append(name)
        folders[:] = kept
        yield root, names


def _is_file(path: Path) -> bool:
    """Whether something can be read as a file, or is not there at all, which reading it will say: no pipe, no device."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def layout_of(root: Path) -> tuple[dict[str, Path], list[str]]:
    """(part → the folder of its class folders, what was left out as sentences); "train" alone is the whole, to be split.

    Splits go by their names; else there are class folders at the top.

    Raises:
        DataError: there are neither, or it is not clear which.
    """
    tops = folders_in(root)
    if not tops:
        unlabelled = " Unlabelled images are read by images:PATH." if pictures_in(root) else ""
        raise DataError(f"{root} has no class folder; expected one for each class, or train/ and val/.{unlabelled}")
    candidates = _candidates(tops)
    if any(folders_in(tops[name]) for name in candidates.get("train", ())):
        return _splits_of(root, tops, by_split(tops, str(root)))
    if set().union(*candidates.values()) == set(tops):  # a class may be called "train", beside "bus" and "car"
        what = "holds no class folders" if "train" in candidates else "is missing"
        raise DataError(
            f"{root} has the splits {listed(tops)}, but train/ {what}. Names that are read: {NAMES_READ}. "
            "Unlabelled images are read by images:PATH."
        )
    _refuse_unknown_splits(root, tops)
    return {"train": root}, []


def _splits_of(root: Path, tops: dict[str, Path], names: dict[str, str]) -> tuple[dict[str, Path], list[str]]:
    folders = {part: tops[name] for part, name in names.items()}
    classes, notes = set(folders_in(folders["train"])), list[str]()
    if "test" in folders and _is_unlabelled(folders["test"]):
        notes.append(f"{names['test']}/ has no class folders, so it was left out; accuracy is counted without it.")
        del folders["test"]
    if "validation" in folders and not folders_in(folders["validation"]):
        raise DataError(
            f"{folders['validation']} has no class folders; sort its images into folders named as those of train/, or "
            "take it away"
        )
    if others := {name for name in tops if name not in names.values()}:
        alike = {name for name in others if classes & set(folders_in(tops[name]))}
        if alike and len(names) == 1:
            raise DataError(
                f"{root} has {names['train']}/ and beside it {listed(alike)}, with folders of the same names. Names "
                f"of splits that are read: {NAMES_READ}. Rename the folder, or take it away."
            )
        notes.append(f"Beside the splits, these folders were left out: {listed(others)}.")
    return folders, notes


def _is_unlabelled(folder: Path) -> bool:
    """Whether a folder holds images and no classes: directly, or in one folder that is called as such a folder is."""
    inner = folders_in(folder)
    return not inner or (len(inner) == 1 and next(iter(inner)).casefold() in (*COLLECTIONS, "unknown", "all", "test"))


def _refuse_unknown_splits(root: Path, tops: dict[str, Path]) -> None:
    """Raises DataError if the folders at the top look like splits of other names, or like a wrapping around the data."""
    if len(tops) == 1:
        (name, only), *_ = tops.items()
        if inner := folders_in(only):
            raise DataError(
                f"{root} has one folder, {name!r}, with {len(inner)} folders in it. If these are the classes or splits, "
                f"set data.source = 'imagefolder:{only}'."
            )
    holders, shared = _alike_inside(tops)
    called = [name for name in tops if LIKE_SPLITS.search(name)]
    if not shared and not (called and (any(holders.values()) or len(called) == len(tops))):
        return
    why = f"hold folders of the same names ({listed(shared)})" if shared else "are called so"
    alike = [name for name, names in holders.items() if names & shared] if shared else called
    raise DataError(
        f"the folders {listed(alike)} in {root} {why}, so they look like splits and not like classes. Names of splits "
        f"that are read: {NAMES_READ}. Rename them; if they are classes, move them into a folder train/."
    )


def _alike_inside(tops: dict[str, Path]) -> tuple[dict[str, set[str]], set[str]]:
    """(folder without pictures of its own → the folders in it, those of them that several such folders have)."""
    holders = {name: set(folders_in(path)) for name, path in tops.items() if not pictures_in(path)}
    times = Counter(inner for names in holders.values() for inner in names if inner.casefold() not in COLLECTIONS)
    return holders, {inner for inner, count in times.items() if count > 1}


def class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """(the class folders of a part, sorted by name, what to say about them); raises DataError."""
    tops = folders_in(folder)
    classes, notes = list(tops), mask_notes(masks_in(folder))
    holders, shared = _alike_inside(tops)
    if shared:
        outer = [name for name, inner in holders.items() if inner & shared]
        notes.append(
            f"The class folders {listed(outer)} of {folder.name}/ hold folders of the same names ({listed(shared)}), whose pictures are "
            f"taken for {listed(outer)}: if the inner folders are the classes, move them up into {folder.name}/."
        )
    alike = Counter(name.casefold() for name in classes)
    if same := [name for name in classes if alike[name.casefold()] > 1]:
        notes.append(f"The class folders {listed(same)} differ only in case, and are classes of their own.")
    if strays := len(pictures_in(folder)):
        notes.append(f"Left out, since in no class folder: {strays} images in {folder.name}/.")
    return classes, notes


def order_notes(classes: Sequence[str]) -> list[str]:
    """One sentence on class folders whose numbers are others where 2 comes before 10, if there are any."""
    natural = sorted(classes, key=natural_key)
    if natural == [*classes]:
        return []
    place = next(index for index, name in enumerate(natural) if classes[index] != name)
    note = (
        f"Class folders are numbered in alphabetical order, as torchvision does it: class {place} is {classes[place]!r}. timm's train.py "
        f"numbers them otherwise, 2 before 10 and without regard to case: class {place} is {natural[place]!r}. If it trained the model, set "
        "data.classes (--classes) to a file with one folder a line in that order."
    )
    return [note]


def require_known(folder: Path, classes: Sequence[str]) -> None:
    """Raises DataError for class folders that train/ lacks."""
    if not (unknown := set(folders_in(folder)) - set(classes)):
        return
    near = {name.casefold(): name for name in classes}
    hint = ""
    if alike := next((name for name in sorted(unknown) if name.casefold() in near), ""):
        hint = f" {alike!r} differs from {near[alike.casefold()]!r} only in case: rename one."
    raise DataError(f"{folder} has class folders that train/ lacks: {listed(unknown)}.{hint}")
