"""Converts a picture of any mode to 8 bits a channel, or refuses it; and summarises what headers say.

`examples/infer_onnx.py` has the same rule in its own words; a test holds the two equal.
"""

from __future__ import annotations

import struct
import warnings
from collections import Counter
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

EIGHT_BIT = frozenset({"1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LA", "La", "PA"})
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # which Pillow converts to what they stand for, and to nothing else
TRANSPARENT = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
GREY = frozenset({"1", "L", "LA", "La", "I", "F"})
FLOAT = "F"
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # whose mode "I" holds 16 bits; that of a TIFF may hold 32, signed or not
ORIENTATION = 0x0112
DARK = 127
"""Of 255: pictures of more than 8 bits of which none is brighter anywhere may hold fewer bits than their format has."""
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLES = 258, 262, 339
BAD_FILE = (OSError, SyntaxError, ValueError, KeyError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is damaged, or too large to be meant."""


def eight_bit(picture: Image.Image, mode: Literal["L", "RGB"], *, turn: bool = False) -> Image.Image:
    """The picture in grey or RGB of 8 bits a channel; integers of more bits are scaled by their full range, floats by 1.

    Transparency is left out: the colours below it stay.

    Args:
        picture: as it was opened, so that it still knows its file's format.
        mode: what the model reads.
        turn: whether to turn it as its EXIF orientation says.

    Raises:
        ValueError: the scale of its pixels is not known; the message names the mode.
    """
    most = largest(picture)
    if turn:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == FLOAT:
        values = np.asarray(picture)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"its pixels are floats (mode F) from {values.min():g} to {values.max():g}; only 0 to 1 has a known scale, so "
                "divide them by what stands for white"
            )
        picture = Image.fromarray((values.astype(np.float64) * 255).round().astype(np.uint8))
    elif most is not None:
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
    elif picture.mode in PREMULTIPLIED:
        picture = picture.convert(PREMULTIPLIED[picture.mode])
    elif picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        picture = picture.convert("RGBA")  # Pillow warns of the direct way, which gives the same colours
    return picture.convert(mode)


def largest(picture: Image.Image) -> int | None:
    """What stands for white in a picture of more than 8 bits a channel, or None if it has 8; read from the header.

    Raises:
        ValueError: it is not known, or is no grey or colour.
    """
    mode, tags = picture.mode, getattr(picture, "tag_v2", {})
    if 2 in np.atleast_1d(tags.get(TIFF_SAMPLES, 1)):
        raise ValueError(f"its pixels are signed integers (mode {mode}), whose range is not known")
    if mode in EIGHT_BIT:
        return None
    if tags.get(TIFF_PHOTOMETRIC, 1) == 0:
        raise ValueError(f"it is a TIFF of mode {mode} in which 0 is white")
    if mode == FLOAT:
        return 1
    if mode.startswith("I;16"):
        return int(2 ** int(np.atleast_1d(tags.get(TIFF_BITS, 16))[0]) - 1)
    if mode == "I" and picture.format in SIXTEEN_BIT_FORMATS:
        return 2**16 - 1
    if mode == "I":
        raise ValueError("its pixels are 32-bit integers (mode I), whose range is not known")
    raise ValueError(f"its mode {mode} is not read; expected grey, RGB or what Pillow converts to them")


class Headers:
    """Counts of what the headers of a source's pictures say, for one note each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.looked_at = 0
        self.brightest_of_deep = 0

    def add(self, picture: Image.Image) -> None:
        """Counts an opened picture; one of more than 8 bits is decoded for it, since only its values tell how many are used.

        Raises:
            ValueError, OSError, SyntaxError: it cannot be read, or has no known scale.
        """
        self.looked_at += 1
        self.counts["turned"] += _is_turned(picture)
        self.counts["frames"] += picture.format != "MPO" and getattr(picture, "is_animated", False)
        self.counts["transparent"] += picture.mode in TRANSPARENT or "transparency" in picture.info
        self.counts["colour"] += not (picture.mode in GREY or picture.mode.startswith("I;"))
        # Of colours of 16 bits Pillow itself keeps 8; that there are more shows in how it reads the file.
        if largest(picture) is None and ";16" not in str(getattr(picture, "tile", "")):
            return
        self.counts["deep"] += 1
        self.brightest_of_deep = max(self.brightest_of_deep, int(np.asarray(eight_bit(picture, "RGB")).max()))

    def notes(self, total: int, turn: bool | None, *, turned: bool, channels: int) -> list[str]:
        """One sentence for each thing that is done to the pictures, or left undone, without being asked for.

        Args:
            total: of the source's pictures; of many an even sample was looked at, and the counts are of these.
            turn: what the recipe says of EXIF orientation, or None.
            turned: whether such pictures are turned.
            channels: that the model reads, 1 or 3.
        """
        stored = "is stored turned (EXIF orientation)", "are stored turned (EXIF orientation)"
        has = "has", "have"
        otherwise = (
            f"data.exif_orientation = {str(not turned).lower()} changes it, if the model's trainer did otherwise."
        )
        dark = (
            f"more than 8 bits and no pixel above {100 * self.brightest_of_deep / 255:.0f} % of the range of the format: that is "
            "how dark the model sees them. If they hold fewer bits than the format has, as a camera's 12 of 16, save them "
            "stretched to all of it, unless the model was trained on them as they are."
        )
        sentences = {
            "turned": (stored, f"and {'were turned upright' if turned else 'are read as stored'}; {otherwise}"),
            "transparent": (has, "transparency; it is left out, and the colours below it are read."),
            "deep": (has, "more than 8 bits; they are scaled to 8 bits."),
            "dark": (has, dark),
            "frames": (has, "several frames; the first one is read."),
        }
        if channels == 1:
            sentences["colour"] = (("is", "are"), "in colour; what the model reads is grey.")
        if turn is turned:  # as was asked for
            del sentences["turned"]
        counts = self.counts + Counter(dark=self.counts["deep"] if self.brightest_of_deep <= DARK else 0)
        of = f"{self.looked_at} images" + (" that were looked at" if self.looked_at < total else "")
        return [
            f"{count} of {of} {verbs[count > 1]} {rest}"
            for what, (verbs, rest) in sentences.items()
            if (count := counts[what])
        ]


def _is_turned(picture: Image.Image) -> bool:
    """Whether EXIF in the header asks for another orientation; not of a TIFF, which Pillow turns by itself."""
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of what does not matter here
            # Of the base class, since that of a PNG decodes the whole picture.
            return picture.format != "TIFF" and Image.Image.getexif(picture).get(ORIENTATION, 1) not in (0, 1)
    except BAD_FILE:
        return False
