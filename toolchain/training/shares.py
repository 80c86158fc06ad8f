"""Splits the global batch of a step between processes, with its order and its augmentation.

Nothing in a global batch depends on the number of processes, so that one recipe is one training on 1 or on 8 of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Sampler

from toolchain.errors import RecipeError


@dataclass(frozen=True)
class Share:
    """The images `start` … `stop` − 1 of a global batch of `total`.

    A process whose share is empty still takes a step, on image `start` with weight 0.
    """

    start: int
    stop: int
    total: int

    @staticmethod
    def of(process: int, processes: int, total: int) -> Share:
        """What process 0 … processes − 1 computes of `total` images: as many as the others, to within one."""
        return Share(total * process // processes, total * (process + 1) // processes, total)

    @property
    def images(self) -> slice:
        """Where the images that are read lie in the global batch; never empty."""
        return slice(self.start, max(self.stop, self.start + 1))

    @property
    def weight(self) -> float:
        """The part of the global mean that a mean over the share stands for."""
        return (self.stop - self.start) / self.total


class EpochOrder(Sampler[int]):
    """The indices that one process reads in an epoch: its share of each global batch, one batch after the other.

    The order of the whole depends on (seed, epoch) alone. Read in batches of `local`, it falls into the shares.

    Raises:
        RecipeError: the global batch cannot be shared equally.
    """

    def __init__(self, size: int, seed: int, batch_size: int, process: int = 0, processes: int = 1) -> None:
        if batch_size % processes:
            low = batch_size // processes * processes
            near = " or ".join(str(fit) for fit in (low, low + processes) if fit)
            raise RecipeError(
                f"batch_size {batch_size} is shared by {processes} processes and is no multiple of their number; "
                f"set batch_size to {near}"
            )
        self.size, self.seed, self.batch_size, self.local = size, seed, batch_size, batch_size // processes
        self.process, self.processes, self.epoch = process, processes, 0

    def shares(self) -> list[Share]:
        """This process's share of every global batch of an epoch; the last batch may be a small one."""
        totals = [min(self.batch_size, self.size - start) for start in range(0, self.size, self.batch_size)]
        return [Share.of(self.process, self.processes, total) for total in totals]

    def __len__(self) -> int:
        return sum(share.images.stop - share.images.start for share in self.shares())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator).tolist()
        for index, share in enumerate(self.shares()):
            batch = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield from batch[share.images]


def seed_of(seed: int, epoch: int, process: int = 0) -> int:
    """The seed of an epoch's draws; with a process, of what that process draws for itself."""
    return (seed * 1_000_003 + epoch) * 1_009 + process


def augment(
    images: Tensor, generator: torch.Generator, *, shift_px: int = 0, flip: bool = False, share: Share | None = None
) -> Tensor:
    """The images [B, C, H, W], each shifted and mirrored by its own draw.

    Args:
        images: all of a global batch, or those of a share.
        generator: on the CPU; draws for the whole global batch, whatever the share.
        shift_px: each image moves by up to that many pixels, edges repeated.
        flip: each image is mirrored with probability ½.
        share: where the images lie in the global batch; None if they are all of it.
    """
    device, (batch, channels, height, width) = images.device, images.shape
    drawn, own = (batch, slice(batch)) if share is None else (share.total, share.images)
    if flip:
        mirrored = torch.rand(drawn, generator=generator)[own].lt(0.5).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if shift_px:
        top, left = torch.randint(0, 2 * shift_px + 1, (2, drawn, 1), generator=generator)[:, own].to(device)
        rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
        padded = functional.pad(images, [shift_px] * 4, mode="replicate")
        each, channel = torch.arange(batch, device=device), torch.arange(channels, device=device)
        images = padded[
            each[:, None, None, None], channel[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
    return images
