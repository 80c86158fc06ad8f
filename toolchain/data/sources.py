"""Opens the data source that `data.source` of a recipe names."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from itertools import islice

from torch import Tensor

from toolchain.data.base import Content, Reader
from toolchain.data.calibration import notes_on
from toolchain.data.classes import read_classes, require_list_of, require_order_of
from toolchain.data.files import ImageFiles, ImageFolder
from toolchain.data.folders import order_notes
from toolchain.data.hub import HuggingFace
from toolchain.data.memory import Digits, FashionMnist, Synthetic
from toolchain.data.scenes import keep_apart, tell_apart
from toolchain.data.splits import Images, arrange, made
from toolchain.data.transforms import Preprocessing, Wanted
from toolchain.errors import DataError, ModelError
from toolchain.files import digest_of, expanded

logger = logging.getLogger(__name__)
LEAST_COMPARED = 3
"""Least number of distinct images on which two models can be compared."""
SEARCHED = 1000
"""How many images are searched for distinct ones."""

SOURCES: dict[str, type[Reader]] = {
    "digits": Digits,
    "fashion-mnist": FashionMnist,
    "imagefolder": ImageFolder,
    "images": ImageFiles,
    "hf": HuggingFace,
    "none": Synthetic,
}


@dataclass(frozen=True, eq=False)
class DataSource:
    """Images in four fixed splits.

    Attributes:
        name: as written in the recipe.
        num_classes: None when unlabelled.
        class_names: name of a class → its label, where classes have names.
        classes: the class map by which labels are numbers of the model's outputs; "" where they are the source's own.
        synthetic: whether the images mean nothing.
        flip: whether training may mirror images.
        preprocessing: what every image went through.
        digest: sha256 of content, splits, preprocessing, and a `flip` that is not usual; where the content lies does not count.
        notes: one sentence for each thing that was left out, or done to the images without being asked for.
        splits: "train", "calibration" (a subset of train), "validation", "test".
        content: identifies what was read, before it is split and prepared; "" if that is not known.
    """

    name: str
    preprocessing: Preprocessing
    digest: str
    splits: Mapping[str, Images] = field(repr=False)
    num_classes: int | None = None
    synthetic: bool = False
    flip: bool = False
    classes: str = ""
    notes: tuple[str, ...] = ()
    content: str = ""
    class_names: Mapping[str, int] = field(default_factory=dict, repr=False)

    @property
    def labelled(self) -> bool:
        """Whether accuracy can be measured."""
        return self.num_classes is not None

    def pictures(self, split: str) -> str:
        """sha256 over the identities of the pictures in a split, without preprocessing and labels; "" if unknown."""
        positions = self.split(split).positions.sort().values.numpy().tobytes()
        return hashlib.sha256(self.content.encode() + positions).hexdigest() if self.content else ""

    @property
    def ordered_names(self) -> tuple[str, ...]:
        """The names of all classes in the order of their labels; () where some have none."""
        names = {number: name for name, number in self.class_names.items()}
        return tuple(names[number] for number in range(len(names))) if names.keys() == set(range(len(names))) else ()

    @property
    def identity(self) -> dict[str, str]:
        """The kind of source and the digest of its content, for files that must not say where it lies."""
        return {"source": self.name.partition(":")[0], "digest": self.digest}

    def split(self, name: str) -> Images:
        """The images of one split, as (image float32 [C, H, W], label) pairs; label −1 when unlabelled."""
        if name not in self.splits:
            raise DataError(f"there is no split {name!r}; expected one of {', '.join(self.splits)}")
        return self.splits[name]

    def noted(self, note: str) -> DataSource:
        """The same source with one more note, which is logged."""
        logger.warning("%s", note)
        return replace(self, notes=(*self.notes, note))

    def order_noted(self, names: Sequence[str]) -> DataSource:
        """The same source, with a note where the model's trainer may have numbered the classes otherwise.

        Args:
            names: of the model's classes in the order of its outputs, which settles it; () where it says none.
        """
        notes = () if names or self.classes or not self.labelled else order_notes(self.ordered_names)
        return reduce(DataSource.noted, notes, self)

    def unlabelled(self, note: str) -> DataSource:
        """The same images in the same splits without their labels, and a note that says why."""
        splits = {name: images.unlabelled() for name, images in self.splits.items()}
        return replace(self, num_classes=None, splits=splits).noted(note)

    def to_compare(self, count: int = LEAST_COMPARED) -> list[Tensor]:
        """Up to `count` images [C, H, W] to compare models on; at least `LEAST_COMPARED`, and the first of them all differ.

        They are the first of validation; where it has too few, of test and then of train.

        Raises:
            DataError: there are not as many that differ, or one cannot be decoded.
        """
        parts = (self.splits[name] for name in ("validation", "test", "train"))
        places = ((images, index) for images in parts for index in range(len(images)))
        distinct: dict[bytes, Tensor] = {}
        others: list[Tensor] = []
        for images, index in islice(places, max(count, SEARCHED)):
            image = images[index][0]
            if len(distinct) < LEAST_COMPARED and (key := image.numpy().tobytes()) not in distinct:
                distinct[key] = image
            else:
                others.append(image)
            if len(distinct) == LEAST_COMPARED and len(distinct) + len(others) >= count:
                break
        if len(distinct) < LEAST_COMPARED:
            read = len(distinct) + len(others)
            # Of fewer, some may stand for two splits.
            which = f"the first {read} images" if read >= SEARCHED else "the images"
            raise DataError(
                f"{which} of the data source {self.name!r} show {len(distinct)} different pictures in all; "
                f"at least {LEAST_COMPARED} are needed to compare models. Add images, or remove copies."
            )
        return [*distinct.values(), *others][: max(count, LEAST_COMPARED)]

    def check_classes(self, num_classes: int | None, names: Sequence[str] = ()) -> None:
        """Raises ModelError if a model whose labels may have that many classes, or none, cannot be judged by these.

        Args:
            num_classes: how many classes labels may have.
            names: of the model's classes in the order of its outputs, where it says them.
        """
        if num_classes is None:
            raise ModelError(
                f"the data source {self.name!r} has labels of {self.num_classes} classes, but the model's outputs are no "
                "classes: compress it on images:PATH, which needs no labels, or say what the outputs are with model.output"
            )
        if self.classes:
            require_list_of(self.classes, num_classes)
            if (
                highest := max(int(images.labels.max()) for images in self.splits.values() if len(images))
            ) >= num_classes:
                raise ModelError(
                    f"data.classes gives class numbers up to {highest}, but the model's {num_classes} outputs are numbered "
                    f"from 0 to {num_classes - 1}. Use the class map that the model was trained with."
                )
        elif self.num_classes is not None and self.num_classes != num_classes:
            raise ModelError(
                f"the model has {num_classes} classes, the data source {self.name!r} has {self.num_classes}. "
                'Where it should keep its classes, data.source = "images:PATH" calibrates without labels, and '
                "data.classes maps the folders of a subset to them; where it should have these, set model.checkpoint "
                f"to weights trained on them, or add [train], with model.kwargs.num_classes = {self.num_classes}."
            )
        else:
            require_order_of(names, self.class_names, self.name)


def open_source(name: str, wanted: Wanted, *, classes: str = "", outputs: int | None = None) -> DataSource:
    """The data source of that name, read and split for a model.

    Args:
        name: as in a recipe.
        wanted: what the model and the recipe want of it.
        classes: a class map, of `CLASS_LISTS` or a path; "" where labels are numbered by the source.
        outputs: how many classes the model has, for the notes; None if that is not known yet.

    Raises:
        DataError: the source is unknown, missing, empty or damaged, or does not fit the model's input.
    """
    kind, argument = _parse(name)
    if classes and not SOURCES[kind].names_classes:
        raise DataError(f"data.classes maps the names of classes, and {kind!r} has none; remove it")
    if (wanted.image_column, wanted.label_column) != (None, None) and not getattr(SOURCES[kind], "has_columns", False):
        raise DataError(
            f"data.image_column and data.label_column name columns of hf:, and {kind!r} has none; remove them"
        )
    numbers = read_classes(classes) if classes else None
    content = SOURCES[kind]().read(argument, replace(wanted, classes=numbers))
    usual = content.flip
    content = replace(content, flip=usual if wanted.mirror is None else wanted.mirror)
    notes = list(content.notes)
    parts, told = content.parts, list[str]()
    if wanted.calibration_images or made(parts):  # else nothing is split, and nothing calibrated
        parts, told = tell_apart(parts)
    try:
        splits = arrange(parts, wanted.calibration_images)
    except DataError as error:  # what was left out may be why
        raise DataError(f"data source {name}: {error}. {' '.join(notes)}".rstrip()) from None
    splits, kept = keep_apart(splits, made(parts))
    if not content.synthetic:
        notes += [*told, *kept, *notes_on(splits["calibration"], wanted.calibration_images, len(splits["train"]))]
    if numbers is not None:
        of = "the model's classes" if outputs is None else f"the model's {outputs} classes"
        notes.append(f"Accuracy is over {content.num_classes} of {of}, by data.classes; any class can be predicted.")
    for note in notes:
        logger.warning("data source %s: %s", name, note)
    return DataSource(
        name=name,
        num_classes=content.num_classes,
        synthetic=content.synthetic,
        flip=content.flip,
        preprocessing=content.preprocessing,
        digest=_digest(kind, content, splits, mapped=numbers is not None, mirrored=content.flip != usual),
        splits=splits,
        classes=classes,
        notes=tuple(notes),
        content=digest_of(kind, content.digest),
        class_names=content.class_names,
    )


def _parse(name: str) -> tuple[str, str]:
    """(kind, argument or "") of "kind" or "kind:argument"; raises DataError if they do not go together."""
    kind, colon, argument = name.partition(":")
    if kind not in SOURCES:
        if name and expanded(name).is_dir():
            raise DataError(
                f"{name} is a folder: write imagefolder:{name} if the folders in it are classes, or images:{name} for pictures without labels"
            )
        near = difflib.get_close_matches(kind, SOURCES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        usages = ", ".join(reader.usage for reader in SOURCES.values())
        raise DataError(f"unknown data source {name!r}; {hint}known: {usages}")
    usage = SOURCES[kind].usage
    if (
        bool(colon) != bool(argument)
        or (argument and ":" not in usage)
        or (not argument and usage.startswith(f"{kind}:"))
    ):
        raise DataError(f"data source {name!r} is written {usage}")
    return kind, argument


def _digest(kind: str, content: Content, splits: Mapping[str, Images], *, mapped: bool, mirrored: bool) -> str:
    """`mapped` says whether labels are by a class map, `mirrored` whether training mirrors where it usually does not, or does not."""
    used = asdict(content.preprocessing)
    if not used["exif_orientation"]:  # what is not done leaves no trace, so that records of older data stay true
        del used["exif_orientation"]
    head = json.dumps(
        [kind, content.digest, used, *(["classes"] if mapped else []), *([content.flip] if mirrored else [])],
        sort_keys=True,
    )
    digest = hashlib.sha256(head.encode())
    for name, images in splits.items():
        digest.update(name.encode() + images.positions.numpy().tobytes() + images.labels.numpy().tobytes())
    return digest.hexdigest()
