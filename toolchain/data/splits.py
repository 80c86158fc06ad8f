"""Images with labels, and how they are split: fixed, seeded, stratified, disjoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from toolchain.errors import DataError

Batch = tuple[Tensor, Tensor]
UNLABELLED = -1
SPLIT_SEED = 0  # the same for every recipe, so that all are judged by the same images
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
VALIDATION_LIMIT = 5000  # the standard error of an accuracy over 5 000 images is at most 0.7 %


class Images(Dataset[tuple[Tensor, int]]):
    """A sequence of (image float32 [C, H, W], label); label −1 where there is none.

    Attributes:
        positions: int64 [N], where each image lies in what the source read; equal parts compare equal.
        workers: how many processes it is worth decoding them in; 0 where there is nothing to decode.
    """

    def __init__(
        self,
        load: Callable[[int], Tensor],
        labels: Sequence[int] | Tensor,
        positions: Tensor | None = None,
        workers: int = 0,
    ) -> None:
        self._load = load
        self._all_labels = torch.as_tensor(labels, dtype=torch.int64)
        self.positions = torch.arange(len(self._all_labels)) if positions is None else positions
        self.workers = workers

    @property
    def labels(self) -> Tensor:
        """The labels, int64 [N]."""
        return self._all_labels[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        position = int(self.positions[index])
        return self._load(position), int(self._all_labels[position])

    def unlabelled(self) -> Images:
        """The same images, each with label −1; no label is read."""
        return Images(self._load, torch.full((len(self._all_labels),), UNLABELLED), self.positions, self.workers)

    def take(self, indices: Tensor) -> Images:
        """The images at the given indices [n] of this sequence; nothing is copied."""
        return Images(self._load, self._all_labels, self.positions[indices], self.workers)


def batches(
    images: Dataset[tuple[Tensor, int]], batch_size: int, order: Sampler[int] | None = None
) -> DataLoader[tuple[Tensor, int]]:
    """A loader of (images [B, C, H, W], labels [B]), as they come or in the given order.

    `Images` are decoded in as many processes as they are worth, but in fewer than there are batches: one batch needs
    none. What comes out does not depend on that, and the global random state is left alone.
    """
    workers = 0
    if isinstance(images, Images) and len(images):
        workers = min(images.workers, math.ceil(len(images) / batch_size) - 1)
    # A loader draws a seed for its workers; its own generator keeps it off the global one.
    return DataLoader(
        images,
        batch_size,
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


def read(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader; a DataError of a worker process says what it said there, without a traceback."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].rstrip()) from error


def hold_out(images: Images, size: int, seed: int) -> tuple[Images, Images]:
    """(the rest, `size` held-out images), stratified: each class gives its share, to within one image.

    A seeded shuffle, stably sorted by label, is sampled at even steps; unlabelled images are simply shuffled.
    """
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[images.labels[shuffled].argsort(stable=True)]
    chosen = torch.zeros(len(images), dtype=torch.bool)
    chosen[by_class[(2 * torch.arange(size) + 1) * len(images) // (2 * size)]] = True
    return images.take((~chosen).nonzero().flatten()), images.take(chosen.nonzero().flatten())


def arrange(parts: Mapping[str, Images], calibration_images: int) -> dict[str, Images]:
    """The four splits of what a source read: "train", and "validation" and "test" where it has them.

    One held-out part alone is the test set, as papers quote it, and validation comes from train. Calibration is a
    seeded subset of train, and all of it if it has fewer images than asked for.

    Raises:
        DataError: there are too few images to give every split one.
    """
    train, validation, test = parts["train"], parts.get("validation"), parts.get("test")
    total = len(train)
    if total < 4:
        raise DataError(f"there are {total} images to train on and to split; at least 4 are needed")
    if test is None:
        test, validation = validation, None
    if test is None:
        train, test = hold_out(train, max(1, round(total * TEST_SHARE)), SPLIT_SEED)
    if validation is None:
        train, validation = hold_out(
            train, min(max(1, round(total * VALIDATION_SHARE)), VALIDATION_LIMIT), SPLIT_SEED + 1
        )
    if not len(validation) or not len(test):
        raise DataError(f"validation has {len(validation)} and test {len(test)} images; each needs at least 1")
    _, calibration = hold_out(train, min(calibration_images, len(train)), SPLIT_SEED + 2)
    return {"train": train, "calibration": calibration, "validation": validation, "test": test}
