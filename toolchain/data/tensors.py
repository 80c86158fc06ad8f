"""A source of model inputs that are in memory already."""

from __future__ import annotations

import hashlib
import logging
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from toolchain.data.calibration import notes_on
from toolchain.data.glances import SIDE, Glances
from toolchain.data.scenes import keep_apart, tell_apart
from toolchain.data.sources import DataSource
from toolchain.data.splits import SPLIT_SEED, TEST_SHARE, UNLABELLED, Images, arrange, hold_out
from toolchain.data.transforms import Preprocessing
from toolchain.errors import DataError

logger = logging.getLogger(__name__)

LEAST = 8
"""Least number of images: fewer leave too few to hold out."""


def tensor_source(images: Tensor) -> DataSource:
    """Unlabelled images float32 [N, C, H, W] as the model takes them: a fifth is held out, the rest calibrates.

    Raises:
        DataError: there are fewer than `LEAST` images, or values that are not finite.
    """
    if len(images) < LEAST:
        raise DataError(f"there are {len(images)} images; at least {LEAST} are needed, and some hundreds are better")
    if not bool(images.isfinite().all()):
        raise DataError("some images hold values that are not finite")
    everything = Images(
        images.__getitem__, torch.full((len(images),), UNLABELLED), glances=Glances(partial(_glance, images))
    )
    parts, told = tell_apart({"train": everything})
    train, held_out = hold_out(parts["train"], max(1, round(len(images) * TEST_SHARE)), SPLIT_SEED)
    splits = arrange({"train": train, "validation": held_out, "test": held_out}, len(train))
    splits, kept = keep_apart(splits, ("validation", "test"))
    notes = (*told, *kept, *notes_on(splits["calibration"], len(train), len(train)))
    for note in notes:
        logger.warning("images: %s", note)
    channels, height, width = images.shape[1:]
    source = DataSource(
        name="tensors",
        preprocessing=Preprocessing((channels, height, width), (0.0,) * channels, (1.0,) * channels),
        digest=hashlib.sha256(images.contiguous().numpy().data).hexdigest(),
        splits=splits,
        notes=notes,
    )
    source.to_compare()
    return source


def _glance(images: Tensor, position: int) -> Tensor:
    """Grey levels of an image, from the darkest of its values to the brightest."""
    grey = functional.interpolate(images[position].mean(0)[None, None], (SIDE, SIDE), mode="bilinear", antialias=True)[
        0, 0
    ]
    low, high = images[position].aminmax()
    return (255 * (grey - low) / (high - low).clamp_min(1e-9)).clamp(0, 255).round().to(torch.uint8)
