"""What is left of a backbone on pictures that it was not compressed on: its features, their neighbours, its saliency maps.

All is kept image by image, so that a page can add up what it likes. Legend: N images, P patches, D width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from toolchain.data import Images
from toolchain.data.stored import PictureFiles
from toolchain.data.transforms import Preprocessing
from toolchain.likelihood import in_batches
from toolchain.model import Preprocess
from toolchain.training.features import voted

K = 5
"""Neighbours that vote; the smallest class has three pictures."""
SIDE, QUALITY = 64, 80
"""Pixels of a map and half of those of a thumbnail as they are recorded, and the quality of its JPEG."""
Decoder = Callable[[Tensor], Tensor]
"""Patch tokens [N, P, D] → maps [N, 1, height, width] in 0…1."""


@dataclass(frozen=True)
class Pictures:
    """A set to be judged on.

    Attributes:
        names: "class/picture" of each, without suffix; of a set without classes its name alone.
        paths: where they lie.
        images: ready for the model, labelled by the number of their class; −1 where there is none.
    """

    names: tuple[str, ...]
    paths: tuple[Path, ...]
    images: Images

    @staticmethod
    def of(folder: Path, preprocess: Preprocess) -> Pictures:
        """The PNG files below a folder, sorted; a folder below it is a class."""
        paths = tuple(sorted(folder.rglob("*.png")))
        names = tuple(path.relative_to(folder).with_suffix("").as_posix() for path in paths)
        classes = [name.rpartition("/")[0] for name in names]
        known = sorted({each for each in classes if each})
        labels = [known.index(each) if each else -1 for each in classes]
        ready = Preprocessing(**asdict(preprocess))
        return Pictures(names, paths, PictureFiles(paths).images(labels, ready))


def tokens_of(module: nn.Module, images: Images) -> Tensor:
    """The tokens after the last norm, [N, 1 + P, D], the class token first."""
    forward: Callable[[Tensor], Tensor] = module.forward_features  # type: ignore[assignment]
    return torch.cat([*in_batches(forward, images)])


def maps_of(decode: Decoder, tokens: Tensor) -> Tensor:
    """The saliency maps [N, height, width] that a decoder draws of tokens."""
    with torch.no_grad():
        return torch.cat([decode(part[:, 1:])[:, 0] for part in tokens.split(32)])


def by_image(ours: Tensor, dense: Tensor) -> dict[str, list[float]]:
    """{"wrong", "spread"} of each image: Σ‖y − y_dense‖² and Σ‖y_dense − mean‖² of outputs [N, …], the mean over images."""
    ours, dense = ours.double().flatten(1), dense.double().flatten(1)
    wrong = (ours - dense).square().sum(1)
    spread = (dense - dense.mean(0)).square().sum(1)
    return {"wrong": _short(wrong), "spread": _short(spread)}


def relative(figures: Mapping[str, Sequence[float]], chosen: Sequence[int] | None = None) -> float:
    """E‖y − y_dense‖² / E‖y_dense − mean‖² of what `by_image` gives, over all images or those at some places."""
    wrong, spread = (np.array(figures[name]) for name in ("wrong", "spread"))
    if chosen is not None:
        wrong, spread = wrong[list(chosen)], spread[list(chosen)]
    return float(wrong.sum() / spread.sum())


def right_of(vectors: Tensor, labels: Tensor, k: int = K) -> Tensor:
    """Which images [N] have the class that most of their nearest others have, by cosine of vectors [N, D]: leave one out."""
    every = torch.arange(len(vectors))
    found = [voted(vectors[i, None], vectors[every != i], labels[every != i], k) for i in range(len(vectors))]
    return torch.cat(found) == labels


def judged(ours: Tensor, dense: Tensor, labels: Tensor) -> dict[str, Any]:
    """What is recorded of tokens [N, 1 + P, D] on one set beside the dense ones: errors, and where there are classes votes."""
    figures: dict[str, Any] = {
        "class": by_image(ours[:, 0], dense[:, 0]),
        "patches": by_image(ours[:, 1:], dense[:, 1:]),
    }
    if int(labels.min()) >= 0:
        figures["neighbours"] = packed(right_of(ours[:, 0], labels))
    return figures


def packed(right: Tensor) -> dict[str, Any]:
    """{"total", "wrong", "correct"} as compression cells record it: one bit each, base64 of big-endian bits."""
    bits = base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()
    return {"total": len(right), "wrong": int((~right).sum()), "correct": bits}


def small_map(drawn: Tensor) -> str:
    """A map [height, width] in 0…1 as SIDE × SIDE bytes in base64."""
    small = functional.interpolate(drawn[None, None].float(), size=(SIDE, SIDE), mode="area")[0, 0]
    return base64.b64encode((255 * small).round().byte().numpy().tobytes()).decode()


def thumbnail(path: Path) -> str:
    """A picture as a small JPEG in base64."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB").resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC)
    small.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _short(values: Tensor) -> list[float]:
    """Six significant digits, which is what float32 has."""
    return [float(f"{value:.6g}") for value in values.tolist()]
