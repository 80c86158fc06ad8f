"""Named data sources: what `data.source` in a recipe can be, and what it becomes."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from toolchain.data.base import Content, Reader
from toolchain.data.files import HuggingFace, ImageFiles, ImageFolder
from toolchain.data.memory import Digits, FashionMnist, Synthetic
from toolchain.data.splits import Images, arrange
from toolchain.data.transforms import Wanted
from toolchain.errors import DataError, ModelError

logger = logging.getLogger(__name__)

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
        labelled: whether accuracy can be measured.
        num_classes: None when unlabelled.
        synthetic: whether the images mean nothing.
        flip: whether training may mirror images.
        mean, std, interpolation, crop_pct, crop_mode: the preprocessing (see `Preprocessing`).
        digest: sha256 of content, splits and preprocessing; where the content lies does not count.
        notes: one sentence for each thing that was left out, or done to the images without being asked for.
        splits: "train", "calibration" (a subset of train), "validation", "test".
    """

    name: str
    labelled: bool
    num_classes: int | None
    synthetic: bool
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float | None
    crop_mode: str | None
    digest: str
    splits: Mapping[str, Images] = field(repr=False)
    notes: tuple[str, ...] = ()

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

    def unlabelled(self, note: str) -> DataSource:
        """The same images in the same splits without their labels, and a note that says why."""
        splits = {name: images.unlabelled() for name, images in self.splits.items()}
        return replace(self, labelled=False, num_classes=None, splits=splits).noted(note)

    def check_classes(self, num_classes: int | None) -> None:
        """Raises ModelError if a model whose labels may have that many classes, or none, cannot be judged by these."""
        if num_classes is None:
            raise ModelError(
                f"the data source {self.name!r} has labels of {self.num_classes} classes, but the model's outputs are no "
                "classes: compress it on images:PATH, which needs no labels, or say what the outputs are with model.output"
            )
        if self.num_classes is not None and self.num_classes != num_classes:
            raise ModelError(
                f"the model has {num_classes} classes, the data source {self.name!r} has {self.num_classes}. "
                'Where it should keep its classes, data.source = "images:PATH" calibrates without labels, and '
                "data.classes maps the folders of a subset to them; where it should have these, set model.checkpoint "
                f"to weights trained on them, or add [train], with model.kwargs.num_classes = {self.num_classes}."
            )


def open_source(
    name: str,
    *,
    input_size: tuple[int, int, int],
    data_config: Mapping[str, Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    calibration_images: int = 512,
) -> DataSource:
    """The data source of that name, read and split for a model with inputs (C, H, W) and timm's data config.

    Raises:
        DataError: the source is unknown, missing, empty or damaged, or does not fit the model's input.
    """
    kind, argument = _parse(name)
    wanted = Wanted(input_size, data_config, mean, std, crop_pct, calibration_images)
    content = SOURCES[kind]().read(argument, wanted)
    splits = arrange(content.parts, calibration_images)
    notes = list(content.notes)
    if (count := len(splits["calibration"])) < calibration_images:
        notes.append(f"Calibration has {count} images, all of train; {calibration_images} were asked for.")
    for note in notes:
        logger.warning("data source %s: %s", name, note)
    used = content.preprocessing
    return DataSource(
        name=name,
        labelled=content.num_classes is not None,
        num_classes=content.num_classes,
        synthetic=content.synthetic,
        flip=content.flip,
        mean=used.mean,
        std=used.std,
        interpolation=used.interpolation,
        crop_pct=used.crop_pct,
        crop_mode=used.crop_mode,
        digest=_digest(kind, content, splits),
        splits=splits,
        notes=tuple(notes),
    )


def _parse(name: str) -> tuple[str, str]:
    """(kind, argument or "") of "kind" or "kind:argument"; raises DataError if they do not go together."""
    kind, colon, argument = name.partition(":")
    if kind not in SOURCES:
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


def _digest(kind: str, content: Content, splits: Mapping[str, Images]) -> str:
    head = json.dumps([kind, content.digest, asdict(content.preprocessing)], sort_keys=True)
    digest = hashlib.sha256(head.encode())
    for name, images in splits.items():
        digest.update(name.encode() + images.positions.numpy().tobytes() + images.labels.numpy().tobytes())
    return digest.hexdigest()
