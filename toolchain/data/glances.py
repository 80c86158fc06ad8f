"""Small grey thumbnails ("glances") of the pictures of a source, and the pairs that look nearly the same.

A picture is described by the differences between neighbouring cells of a coarse grid over it: brightness, contrast, size and
encoding leave these nearly as they are, other motifs do not. A picture is also laid on parts of others, so that crops are found.

Legend: N pictures, S side of a glance, G side of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from toolchain.data.pictures import BAD_FILE, eight_bit

SIDE = 48
GRID = 12
DECODED_SIDE = 96
"""JPEG files are decoded at a fraction of their size, but no smaller."""
FLAT = 1.0
"""Least root mean square of grey-level differences between cells: a flatter picture cannot be recognised."""
ALIKE = 0.8
"""The correlation from which on pictures are alike; docs/adr/0023 has what it finds, and what it takes for alike wrongly."""
PARTS = (  # top, left, height, width of what is compared: the whole, crops of 0.72 of the area, and of three quarters
    (0.0, 0.0, 1.0, 1.0),
    *((y, x, 0.85, 0.85) for y, x in ((0.0, 0.0), (0.0, 0.15), (0.15, 0.0), (0.15, 0.15), (0.075, 0.075))),
    (0.0, 0.125, 1.0, 0.75),
    (0.125, 0.0, 0.75, 1.0),
)
ROWS = 256  # compared at once

Look = Callable[[int], Tensor | None]
"""Position → grey levels uint8 [S, S], squashed to a square; None for a picture that cannot be decoded."""


@dataclass(frozen=True)
class Glances:
    """How the images of a source, by position, are told apart.

    Attributes:
        look: a glance at each.
        names: their paths below the source's folder, or none where they have no names.
    """

    look: Look
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures that look nearly the same.

    Attributes:
        one, other: int64 [P] each, indices of the pictures.
        likeness: float32 [P], up to 1.
    """

    one: Tensor
    other: Tensor
    likeness: Tensor

    def __add__(self, others: Pairs) -> Pairs:
        ends = ((self.one, others.one), (self.other, others.other), (self.likeness, others.likeness))
        return Pairs(*(torch.cat(parts) for parts in ends))


def glance(open_picture: Callable[[], Image.Image], *, turn: bool) -> Tensor | None:
    """Grey levels uint8 [S, S] of a picture; None if it cannot be decoded, which is said where it is needed.

    Args:
        open_picture: opens it.
        turn: whether to turn it as its EXIF orientation says.
    """
    try:
        with open_picture() as picture:
            if picture.format == "JPEG":
                picture.draft("L", (DECODED_SIDE, DECODED_SIDE))
            grey = eight_bit(picture, "L", turn=turn)
            small = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0)
            return torch.from_numpy(np.asarray(small).copy())
    except BAD_FILE:
        return None


def glances_at(looks: Sequence[tuple[Look, int]], workers: int) -> Tensor:
    """Grey levels uint8 [N, S, S] of (look, position) pairs, looked at in threads; black where there is nothing to see."""
    nothing = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    if not workers:
        seen = [look(position) for look, position in looks]
    else:
        pool = ThreadPoolExecutor(min(workers, len(looks) or 1), thread_name_prefix="slimvit-glance")
        try:
            seen = list(pool.map(lambda each: each[0](each[1]), looks))
        finally:
            pool.shutdown(cancel_futures=True)
    return (
        torch.stack([nothing if each is None else each for each in seen]) if seen else nothing[:0].view(0, SIDE, SIDE)
    )


def _described(glances: Tensor, part: tuple[float, float, float, float]) -> Tensor:
    """What a part of each glance [N, S, S] is known by, float32 [N, 2(G-1)²] of norm 1; zeros where it is flat."""
    top, left, height, width = (round(SIDE * share) for share in part)
    cut = glances[:, None, top : top + height, left : left + width].float()
    cells = functional.interpolate(cut, (GRID, GRID), mode="bilinear", antialias=True)[:, 0]
    across, down = cells[:, :-1, 1:] - cells[:, :-1, :-1], cells[:, 1:, :-1] - cells[:, :-1, :-1]
    steps = torch.cat([across.flatten(1), down.flatten(1)], 1)
    size = steps.norm(dim=1, keepdim=True)
    return torch.where(size > FLAT * steps.shape[1] ** 0.5, steps / size.clamp_min(1e-9), 0.0)


def alike(glances: Tensor) -> Pairs:
    """All pairs of glances [N, S, S] that are alike; flat ones are like nothing."""
    parts = [_described(glances, part) for part in PARTS]
    whole, found = parts[0], []
    for start in range(0, len(glances), ROWS):
        rows, columns = slice(start, start + ROWS), slice(start, None)
        likeness = whole[rows] @ whole[columns].T
        for part in parts[1:]:
            for one, other in ((whole, part), (part, whole)):
                likeness = torch.maximum(likeness, one[rows] @ other[columns].T)
        one, other = torch.nonzero(torch.triu(likeness, 1) >= ALIKE, as_tuple=True)
        found.append(Pairs(one + start, other + start, likeness[one, other]))
    nothing = torch.zeros(0, dtype=torch.int64)
    return sum(found, Pairs(nothing, nothing, torch.zeros(0)))


def likenesses(glances: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """How alike the given pairs [P] of glances [N, S, S] are, float32 [P] from −1 to 1; no crops are sought."""
    whole = _described(glances, PARTS[0])
    return (whole[one] * whole[other]).sum(1)
