"""Images with labels, and how they are split: fixed, seeded, stratified, disjoint, and no scene on two sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from toolchain.data.glances import Glances
from toolchain.errors import DataError

Counts = NDArray[np.int64]

UNLABELLED = -1
SPLIT_SEED = 0  # the same for every recipe, so that all are judged by the same images
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
VALIDATION_LIMIT = 5000  # the standard error of an accuracy over 5 000 images is at most 0.7 %


class Images(Dataset[tuple[Tensor, int]]):
    """A sequence of (image float32 [C, H, W], label); label −1 where there is none.

    Attributes:
        positions: int64 [N], where each image lies in what the source read; equal parts compare equal.
        workers: how many threads it is worth decoding them in; 0 where there is nothing to decode.
        all_scenes: of all positions, as `scenes` has it of the images.
        glances: how all positions are told apart; None where each image is taken for a scene of its own.
    """

    def __init__(
        self,
        load: Callable[[int], Tensor],
        labels: Sequence[int] | Tensor,
        positions: Tensor | None = None,
        workers: int = 0,
        finish: Callable[[Tensor], Tensor] | None = None,
        scenes: Tensor | None = None,
        glances: Glances | None = None,
    ) -> None:
        """Images in the order of `positions`.

        Args:
            load: position → what is kept of an image until it is asked for: the image, or what `finish` takes.
            labels: of all positions.
            positions: all of them, one after the other, if None.
            workers: as the attribute.
            finish: what `load` gave, stacked [B, …] → images float32 [B, C, H, W]; None if `load` gives images.
            scenes: of all positions; each its own if None.
            glances: as the attribute.
        """
        self._load, self._finish = load, finish
        self._all_labels = torch.as_tensor(labels, dtype=torch.int64)
        self.positions = torch.arange(len(self._all_labels)) if positions is None else positions
        self.all_scenes = torch.arange(len(self._all_labels)) if scenes is None else scenes
        self.workers, self.glances = workers, glances

    @property
    def labels(self) -> Tensor:
        """The labels, int64 [N]."""
        return self._all_labels[self.positions]

    @property
    def scenes(self) -> Tensor:
        """The number of the scene that each image shows, int64 [N]; all differ where nothing is known of them."""
        return self.all_scenes[self.positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.finished([self.raw(index)])[0], int(self._all_labels[self.positions[index]])

    def raw(self, index: int) -> Tensor:
        """An image before `finished`: decoded, and small enough to be kept for a while."""
        return self._load(int(self.positions[index]))

    def finished(self, raw: Sequence[Tensor]) -> Tensor:
        """float32 [B, C, H, W] of what `raw` gave, each as if it were alone."""
        stacked = torch.stack(list(raw))
        return stacked if self._finish is None else self._finish(stacked)

    def unlabelled(self) -> Images:
        """The same images, each with label −1; no label is read."""
        return self._changed(labels=torch.full((len(self._all_labels),), UNLABELLED))

    def of_scenes(self, scenes: Tensor) -> Images:
        """The same images, of the given scenes, int64 of all positions."""
        return self._changed(scenes=scenes)

    def spread(self, count: int) -> Images:
        """At most `count` of them at even steps, at least one: folders, and so splits, are often in the order of classes."""
        count = min(max(count, 1), len(self))
        return self.take(torch.arange(count) * len(self) // max(count, 1))

    def take(self, indices: Tensor) -> Images:
        """The images at the given indices [n] of this sequence; nothing is copied."""
        return self._changed(positions=self.positions[indices])

    def _changed(
        self, labels: Tensor | None = None, positions: Tensor | None = None, scenes: Tensor | None = None
    ) -> Images:
        return Images(
            self._load,
            self._all_labels if labels is None else labels,
            self.positions if positions is None else positions,
            self.workers,
            self._finish,
            self.all_scenes if scenes is None else scenes,
            self.glances,
        )


def counted(images: int) -> str:
    """So many images, in words for a message."""
    return "1 image" if images == 1 else f"{images} images"


def hold_out(images: Images, size: int, seed: int) -> tuple[Images, Images]:
    """(the rest, about `size` held-out images), stratified, with every scene on one side.

    Where each image is a scene of its own, exactly `size` are held out, and each class gives its share to within one image.
    Else a scene counts for the class of one of its images, and both are kept to within the size of a scene; as long as there
    are two scenes, both sides have one.
    """
    chosen = _sampled(images.labels, images.scenes, size, seed)
    return images.take((~chosen).nonzero().flatten()), images.take(chosen.nonzero().flatten())


def varied(images: Images, size: int, seed: int) -> Images:
    """`size` of the images, stratified; of each scene one, before there are two of any."""
    firsts = torch.from_numpy(np.unique(images.scenes.numpy(), return_index=True)[1]).sort().values
    chosen = torch.zeros(len(images), dtype=torch.bool)
    labels, count = images.labels, min(size, len(firsts))
    chosen[firsts[_sampled(labels[firsts], firsts, count, seed)]] = True
    others = (~chosen).nonzero().flatten()
    if size > count:
        chosen[others[_sampled(labels[others], others, size - count, seed)]] = True
    return images.take(chosen.nonzero().flatten())


def _sampled(labels: Tensor, scenes: Tensor, size: int, seed: int) -> Tensor:
    """Which images are taken, bool [N]: about `size`, in whole scenes.

    A seeded shuffle, stably sorted by label, is sampled at even steps. Scenes of which a part is taken then go to the side
    where most of them is, and as few others as can be change sides for the numbers that this leaves.
    """
    total = len(labels)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    taken = torch.zeros(total, dtype=torch.bool)
    taken[by_class[(2 * torch.arange(size) + 1) * total // (2 * size)]] = True
    _, firsts, of_scene, sizes = np.unique(
        scenes[by_class].numpy(), return_index=True, return_inverse=True, return_counts=True
    )
    if len(sizes) < total:
        parts = np.bincount(of_scene, weights=taken[by_class].numpy(), minlength=len(sizes)).astype(np.int64)
        whole = _whole(parts, sizes, firsts, labels[by_class].numpy()[firsts])
        taken[by_class] = torch.from_numpy(whole[of_scene])
    return taken


def _whole(parts: Counts, sizes: Counts, firsts: Counts, labels: Counts) -> NDArray[np.bool_]:
    """Which scenes are taken, so that of each class about as many images are as were taken in parts.

    Args:
        parts: of each scene [S], how many images were taken.
        sizes, firsts, labels: how many it has, where it comes first in the shuffle, and the class that it counts for.
    """
    taken = 2 * parts > sizes
    if 0 < parts.sum() < sizes.sum():
        due = 0  # so many images too few are taken, of this class and those before it
        order = np.lexsort((firsts, -sizes, labels))  # large ones first, so that small ones can make up for them
        for scenes in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
            due += int((parts[scenes] - sizes[scenes] * taken[scenes]).sum())
            for scene in scenes.tolist():
                if 2 * abs(due) > sizes[scene] and taken[scene] == (due < 0):
                    due += int(sizes[scene]) if taken[scene] else -int(sizes[scene])
                    taken[scene] = not taken[scene]
        if len(sizes) > 1 and taken.all() == taken.any():  # all are on one side
            lightest = int(sizes.argmin())
            taken[lightest] = not taken[lightest]
    return taken


def made(parts: Mapping[str, Images]) -> tuple[str, ...]:
    """Which of "validation" and "test" `arrange` takes from train, since a source has one of them or neither."""
    return ("validation", "test")[: 2 - len({"validation", "test"} & set(parts))]


def arrange(parts: Mapping[str, Images], calibration_images: int) -> dict[str, Images]:
    """The four splits of what a source read: "train", and "validation" and "test" where it has them.

    One held-out part alone is the test set, as papers quote it, and validation comes from train. Calibration is a
    seeded subset of train, of as many scenes as can be, and all of it if it has fewer images than asked for.

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
    calibration = varied(train, min(calibration_images, len(train)), SPLIT_SEED + 2)
    return {"train": train, "calibration": calibration, "validation": validation, "test": test}
