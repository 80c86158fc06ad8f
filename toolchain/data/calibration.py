"""Notes on calibration images that are too few, or too much alike."""

from __future__ import annotations

import torch

from toolchain.data.splits import Images, counted

FEW = 128
ADVICE = "Add images of other things and places until some hundreds differ; they need no labels (docs/calibration.md)."


def notes_on(calibration: Images, asked: int, train: int) -> list[str]:
    """One sentence for each shortcoming of the calibration images; none if no images were requested.

    Args:
        calibration: the images.
        asked: how many the recipe would like.
        train: how many images there are to take them from.
    """
    count, notes = len(calibration), []
    if count < asked and count == train:
        notes.append(f"Calibration has {counted(count)}, all of train; {asked} were asked for.")
    if asked and 0 < count < FEW:
        more = ADVICE if count == train else f"Set data.calibration_images above {count}, best to some hundreds."
        notes.append(
            f"{counted(count)} {'is' if count == 1 else 'are'} few to calibrate on, and the compressed model may be worse on other "
            f"images than on {'this one' if count == 1 else 'these'}. {more}"
        )
    if count and asked and (scenes := different(calibration)) < count / 2:
        notes.append(
            f"Many of the {count} images of calibration look nearly the same, and count for about {scenes:.0f} that differ: the "
            f"compressed model may be worse on other scenes than on these. {ADVICE}"
        )
    return notes


def different(images: Images) -> float:
    """The number of scenes that, equally large, would be as varied as those of the images: N² over the sum of their squares."""
    sizes = torch.unique(images.scenes, return_counts=True)[1].double()
    return float(sizes.sum() ** 2 / sizes.square().sum())
