"""Picture files of every mode that Pillow opens, each with what reading it must give."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

GREY = np.random.default_rng(0).integers(0, 256, (12, 10), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (12, 10, 3), dtype=np.uint8)
ALPHA = np.random.default_rng(2).integers(1, 256, (12, 10), dtype=np.uint8)
ORIENTATION = 0x0112
SIDEWAYS = 6  # stored turned by a quarter
Write = Callable[[Path], None]


def tiff(samples: bytes, *, bits: int, kind: int = 1, photometric: int = 1, extra: int | None = None) -> Write:
    """A little-endian TIFF of one strip, of the size of `GREY`, with what Pillow itself does not write."""
    height, width = GREY.shape
    each = [bits, bits] if extra is not None else [bits]
    tags = {256: [width], 257: [height], 258: each, 259: [1], 262: [photometric], 273: [8], 277: [len(each)]}
    tags |= {278: [height], 279: [len(samples)], 339: [kind] * len(each)}
    if extra is not None:
        tags[338] = [extra]
    fields = b"".join(
        struct.pack("<HHI", tag, 3, len(values)) + struct.pack(f"<{len(values)}H", *values).ljust(4, b"\0")
        for tag, values in sorted(tags.items())
    )
    folder = struct.pack("<H", len(tags)) + fields + struct.pack("<I", 0)
    return lambda path: path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(samples)) + samples + folder) and None


def png_16(pixels: np.ndarray) -> Write:
    """An RGB PNG of 16 bits a channel, which Pillow does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(whole) and None


def pgm(values: np.ndarray, most: int) -> Write:
    height, width = values.shape
    head = f"P5 {width} {height} {most}\n".encode()
    return lambda path: path.write_bytes(head + values.astype(">u2").tobytes()) and None


def of(pixels: np.ndarray, mode: str | None = None, **options: object) -> Write:
    """What Pillow writes of an array, after a conversion to `mode`."""

    def save(path: Path) -> None:
        picture = Image.fromarray(pixels)
        (picture.convert(mode) if mode else picture).save(path, **options)

    return save


def turned(pixels: np.ndarray) -> Write:
    exif = Image.Exif()
    exif[ORIENTATION] = SIDEWAYS
    return of(pixels, exif=exif)


def palette(transparency: int | bytes) -> Write:
    """A palette of which one colour is transparent, or each by its own share."""
    return lambda path: Image.fromarray(COLOUR).quantize(16).save(path, transparency=transparency)


def twelve_bits() -> bytes:
    a, b = ((GREY.astype(np.uint32) * 4095 + 127) // 255).reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=1).astype(np.uint8).tobytes()


SCALED, READ, REFUSED = "scaled", "read", "refused"
FILES: dict[str, tuple[Write, str]] = {
    # "scaled": reading them in grey gives `GREY`. "read": as Pillow has it. "refused": by name.
    "grey.png": (of(GREY), SCALED),
    "one_bit.png": (of(GREY, "1"), READ),
    "grey_16.png": (of(GREY.astype(np.uint16) * 257), SCALED),
    "grey_16.tif": (of(GREY.astype(np.uint16) * 257), SCALED),
    "grey_16_big_endian.tif": (of(GREY.astype(">u2") * 257), SCALED),
    "grey_12.tif": (tiff(twelve_bits(), bits=12), SCALED),
    "grey_16.pgm": (pgm(GREY.astype(np.uint16) * 257, 65535), SCALED),
    "grey_10.pgm": (pgm((GREY.astype(np.uint32) * 1023 + 127) // 255, 1023), SCALED),
    "float_1.tif": (of(GREY.astype(np.float32) / 255), SCALED),
    "float_255.tif": (of(GREY.astype(np.float32)), REFUSED),
    "float_negative.tif": (of(GREY.astype(np.float32) / 255 - 0.1), REFUSED),
    "float_nan.tif": (
        of(np.where(GREY.max() == GREY, np.nan, GREY.astype(np.float32) / 255).astype(np.float32)),
        REFUSED,
    ),
    "int_32.tif": (of(GREY.astype(np.int32) * 257), REFUSED),
    "int_16_signed.tif": (tiff(GREY.astype("<i2").tobytes(), bits=16, kind=2), REFUSED),
    "int_8_signed.tif": (tiff(GREY.tobytes(), bits=8, kind=2), REFUSED),
    "white_is_0.tif": (tiff((255 - GREY).tobytes(), bits=8, photometric=0), SCALED),
    "white_is_0_16.tif": (tiff(GREY.astype("<u2").tobytes(), bits=16, photometric=0), REFUSED),
    "grey_alpha.png": (of(np.dstack([GREY, ALPHA])), SCALED),
    "grey_premultiplied.tif": (tiff(np.dstack([GREY, np.full_like(GREY, 255)]).tobytes(), bits=8, extra=1), SCALED),
    "colour.png": (of(COLOUR), READ),
    "colour_16.png": (png_16(COLOUR.astype(np.uint16) * 257), READ),
    "colour_alpha.png": (of(np.dstack([COLOUR, ALPHA])), READ),
    "palette.png": (of(COLOUR, "P"), READ),
    "palette_transparent.png": (palette(3), READ),
    "palette_half_transparent.png": (palette(bytes(range(0, 256, 16))), READ),
    "cmyk.tif": (of(COLOUR, "CMYK"), READ),
    "cmyk.jpg": (of(COLOUR, "CMYK"), READ),
    "ycbcr.tif": (of(COLOUR, "YCbCr"), READ),
    "lab.tif": (lambda path: Image.new("LAB", (10, 12)).save(path), REFUSED),
    "turned.jpg": (turned(COLOUR), READ),
    "turned.png": (turned(COLOUR), READ),
    "turned_16.png": (turned(GREY.astype(np.uint16) * 257), READ),
    "turned.tif": (turned(COLOUR), READ),
}


def write(path: Path) -> Path:
    """Writes the file of that name."""
    FILES[path.name][0](path)
    return path
