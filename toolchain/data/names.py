"""Relations between pictures that follow from file names: copies of one picture, and consecutive frames."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import PurePath

SIZE = re.compile(r"[-_ .]?\d{2,5}x\d{2,5}$")
COPY = re.compile(r"([-_ .](\d{2,5}x\d{2,5}|copy|crop(ped)?\d*|resized|thumb(nail)?)|@\dx)$")
AUGMENTED = re.compile(r"[-_.](jpe?g|png)\.rf\.[0-9a-f]{16,}$")
"""What Roboflow adds to the name of a picture for each of its variants."""
MOST_COPIES = 16
"""Largest group of names that count as copies: in a larger group the endings distinguish different pictures."""
NUMBERED = re.compile(r"(.*?)(\d{1,9})$", re.DOTALL)


def copies(names: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of positions, each with the next, of files in one folder whose names say that they are one picture.

    They differ in what comes after the stem: a size, "crop", "copy", "resized", "thumb", or the file's type.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for position, name in enumerate(names):
        folder, stem = _parts(name)
        groups.setdefault((folder, _without_endings(stem)), []).append(position)
    return [pair for group in groups.values() if len(group) <= MOST_COPIES for pair in pairwise(group)]


def neighbours(names: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Pairs of positions of files that are numbered one after the other, as frames of a film are; a list for each such row.

    Files of one number, as `a1.jpg`, `a01.jpg` and `a1.png`, are all in it.
    """
    rows: dict[tuple[str, str], dict[int, list[int]]] = {}
    for position, name in enumerate(names):
        folder, stem = _parts(name)
        if numbered := NUMBERED.match(stem):
            rows.setdefault((folder, numbered[1]), {}).setdefault(int(numbered[2]), []).append(position)
    found = ([pair for number in row for pair in _next_to(row, number)] for row in rows.values())
    return [pairs for pairs in found if pairs]


def _next_to(row: Mapping[int, Sequence[int]], number: int) -> list[tuple[int, int]]:
    """Pairs of positions: all of a number with the first of the next, and the first with the others of the next."""
    several, following = row[number], row.get(number + 1, ())
    return [(one, following[0]) for one in several if following] + [(several[0], other) for other in following[1:]]


def folder_of(name: str) -> str:
    """The folder that a name lies in."""
    return name.rpartition("/")[0]


def _parts(name: str) -> tuple[str, str]:
    """(folder, stem in lower case) of a name."""
    folder, _, file = name.rpartition("/")
    return folder, PurePath(file).stem.casefold()


def _without_endings(stem: str) -> str:
    if SIZE.fullmatch(stem):
        return ""
    stem = AUGMENTED.sub("", stem)
    while (shorter := COPY.sub("", stem)) and shorter != stem:
        stem = shorter
    return stem
