"""The interface of a data source: one class with `usage`, `names_classes` and `read`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from toolchain.data.splits import Images
from toolchain.data.transforms import Preprocessing, Wanted


@dataclass(frozen=True)
class Content:
    """The content of a source, before it is split.

    Attributes:
        parts: "train", and "validation" and "test" where the source has them.
        preprocessing: what every image went through.
        digest: identifies the content, not where it lies.
        num_classes: how many classes there are; None when unlabelled.
        class_names: name of a class → its label, where classes have names.
        flip: whether a mirrored image is as good as the image.
        synthetic: whether the images mean nothing.
        notes: one sentence for each thing that was left out, or done to the images without being asked for.
    """

    parts: Mapping[str, Images]
    preprocessing: Preprocessing
    digest: str
    num_classes: int | None = None
    flip: bool = False
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    class_names: Mapping[str, int] = field(default_factory=dict)


class Reader(Protocol):
    """One kind of source; the argument is what follows the colon in the recipe.

    `usage` shows the user how it is written; it also says whether an argument is "kind" (none), "kind:ARG" (needed) or
    "kind[:ARG]" (optional). `names_classes` says whether its classes have names, which `data.classes` can map. One that also has
    `has_columns` true reads a table, whose columns `data.image_column` and `data.label_column` name.
    """

    usage: ClassVar[str]
    names_classes: ClassVar[bool]

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """The images of the source; raises DataError if it is missing, empty, damaged or does not fit the model."""
        ...
