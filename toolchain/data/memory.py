"""Sources that fit into memory: digits, fashion-mnist, none."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolchain.data.base import Content
from toolchain.data.splits import SPLIT_SEED, UNLABELLED, Images
from toolchain.data.transforms import Preprocessing, Wanted
from toolchain.errors import DataError
from toolchain.files import expanded

PRECOMPUTE_BYTES = 256 * 2**20  # model inputs up to this size are computed once and kept


def images_of(
    pixels: Tensor, labels: Tensor, preprocessing: Preprocessing, kept_bytes: int = PRECOMPUTE_BYTES
) -> Images:
    """Images over pixels [N, 1, h, w]: ready model inputs where all take at most `kept_bytes`, else computed at each access."""
    if 4 * len(pixels) * int(np.prod(preprocessing.input_size)) <= kept_bytes:
        return Images(preprocessing.of_pixels(pixels).__getitem__, labels)
    return Images(pixels.__getitem__, labels, finish=preprocessing.of_pixels)


def _notes(pixels: Tensor, preprocessing: Preprocessing) -> tuple[str, ...]:
    """What becomes of pixels [N, 1, h, w] of another size or number of channels than the model's input, as sentences."""
    channels, height, width = preprocessing.input_size
    notes = []
    if (size := tuple(pixels.shape[-2:])) != (height, width):
        notes.append(f"Images of {size[0]}×{size[1]} pixels are resized to the model's {height}×{width}.")
    if channels != 1:
        notes.append(f"Grey images are repeated over the model's {channels} channels.")
    return tuple(notes)


class Digits:
    """scikit-learn's 1 797 handwritten digits, 8×8, embedded in that package."""

    usage: ClassVar[str] = "digits"
    names_classes: ClassVar[bool] = False
    mean, std = 0.3053, 0.3760  # of all pixels, in 0..1

    def read(self, _argument: str, wanted: Wanted, /) -> Content:
        """All images as one part; raises DataError if a crop is asked for."""
        from sklearn.datasets import load_digits  # over a second of imports that no other source needs

        digits = load_digits()
        pixels: NDArray[np.float32] = (digits.images / 16).astype(np.float32)[:, None]  # [1797, 1, 8, 8], from 0..16
        labels = digits.target.astype(np.int64)
        preprocessing = wanted.declared(self.mean, self.std)
        images = images_of(torch.from_numpy(pixels), torch.from_numpy(labels), preprocessing)
        digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
        notes = _notes(torch.from_numpy(pixels), preprocessing)
        return Content({"train": images}, preprocessing, digest, num_classes=10, notes=notes)


class FashionMnist:
    """Zalando's 70 000 articles, 28×28, from IDX files as Debian or torchvision lay them out."""

    usage: ClassVar[str] = "fashion-mnist[:PATH]"
    names_classes: ClassVar[bool] = False
    mean, std = 0.2860, 0.3530  # of the training pixels, in 0..1
    folders = ("~/.cache", "/usr/share/datasets/fashion-mnist")
    prefixes = {"train": "train", "test": "t10k"}  # noqa: RUF012 - never written to

    def read(self, argument: str, wanted: Wanted, /) -> Content:
        """The 60 000 and the 10 000; raises DataError if the files are missing or damaged."""
        preprocessing = wanted.declared(self.mean, self.std)
        digest = hashlib.sha256()
        parts: dict[str, Images] = {}
        notes: tuple[str, ...] = ()
        for part, prefix in self.prefixes.items():
            pixels = _read_idx(self._find(argument, f"{prefix}-images-idx3-ubyte"), 3)  # [N, 28, 28]
            labels = _read_idx(self._find(argument, f"{prefix}-labels-idx1-ubyte"), 1)  # [N]
            if len(pixels) != len(labels) or labels.max(initial=0) > 9:
                raise DataError(
                    f"fashion-mnist: the {part} files hold {len(pixels)} images and {len(labels)} labels up to "
                    f"{labels.max(initial=0)}; expected as many labels as images, from 0 to 9"
                )
            digest.update(pixels.tobytes() + labels.tobytes())
            images = torch.from_numpy(pixels[:, None])
            parts[part] = images_of(images, torch.from_numpy(labels).long(), preprocessing)
            notes = _notes(images, preprocessing)
        return Content(parts, preprocessing, digest.hexdigest(), num_classes=10, flip=True, notes=notes)

    def _find(self, argument: str, name: str) -> Path:
        folders = (argument,) if argument else self.folders
        for folder in (expanded(text) / below for text in folders for below in ("", "FashionMNIST/raw", "raw")):
            for path in (folder / f"{name}.gz", folder / name):
                if path.is_file():
                    return path
        raise DataError(
            f"fashion-mnist: no {name}[.gz] in {', '.join(folders)} or FashionMNIST/raw below. "
            "Install it with: apt-get install dataset-fashion-mnist"
        )


class Synthetic:
    """Seeded normal images, for size and latency only; each is made when it is asked for."""

    usage: ClassVar[str] = "none"
    names_classes: ClassVar[bool] = False
    held_out = 128

    def read(self, _argument: str, wanted: Wanted, /) -> Content:
        """Unlabelled images; the preprocessing is what the deployed model will expect, drawn ones are past it."""
        preprocessing = wanted.natural() if wanted.input_size[0] in (1, 3) else wanted.declared(0.0, 1.0)
        parts, start = {}, 0
        for part, size in (
            ("train", max(wanted.calibration_images, 4)),
            ("validation", self.held_out),
            ("test", self.held_out),
        ):
            load = partial(_normal, wanted.input_size, SPLIT_SEED * 1_000_003 + start)
            parts[part] = Images(load, [UNLABELLED] * size)
            start += size
        return Content(parts, preprocessing, f"normal, seed {SPLIT_SEED}", synthetic=True)


def _normal(input_size: tuple[int, int, int], seed: int, position: int) -> Tensor:
    return torch.randn(input_size, generator=torch.Generator().manual_seed(seed + position))


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file (big-endian: magic 0x08 << 8 | rank, one uint32 per axis, then the bytes).

    Raises:
        DataError: the file cannot be read, or is not a whole IDX file of that rank.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic, *shape = struct.unpack_from(f">{rank + 1}I", raw)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    body = np.frombuffer(raw, np.uint8, offset=4 * (rank + 1))
    if magic != (0x0800 | rank) or body.size != int(np.prod(shape)):
        raise DataError(
            f"{path} is not an IDX file of rank {rank}: magic {magic:#x}, shape {shape}, {body.size} bytes of data"
        )
    return body.reshape(shape).copy()
