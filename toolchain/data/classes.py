"""Class maps: class folder → output of the model, so that a subset of the classes can be evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo

from toolchain.data.folders import NAMED, listed
from toolchain.errors import DataError, ModelError, fault_words
from toolchain.places import CLASS_LISTS

FORMS = (
    'expected JSON of the form {"folder": number}, or text with one folder name a line; '
    f"or one of the lists {', '.join(CLASS_LISTS)}"
)


def read_classes(name: str) -> dict[str, int]:
    """Class folder → number of the model's output.

    Args:
        name: one of `CLASS_LISTS`, whose folders are WordNet synsets such as n01440764; or the path of a JSON or text file.

    Raises:
        DataError: there is no such list or file, it is of another form, or names a folder or a number twice.
    """
    if name in CLASS_LISTS:
        synsets = ImageNetInfo(name).label_names()  # type: ignore[no-untyped-call]
        return {synset: number for number, synset in enumerate(synsets)}
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = fault_words(error) if isinstance(error, OSError) else "it is not text"
        raise DataError(f"cannot read data.classes {name}: {why}; {FORMS}") from None
    pairs = _of_json(text, path) if path.suffix.lower() == ".json" else _of_lines(text, path)
    return _unique(pairs, path)


def require_list_of(name: str, outputs: int) -> None:
    """Raises DataError if `name` is a list that timm ships and a model with so many outputs was not trained on it."""
    if name not in CLASS_LISTS or len(read_classes(name)) == outputs:
        return
    fitting = [each for each in CLASS_LISTS if len(read_classes(each)) == outputs]
    do = f"that has {listed(fitting)}" if fitting else "name a file with its classes"
    raise DataError(
        f"data.classes = {name!r} has {len(read_classes(name))} classes and the model {outputs}, so its outputs stand for "
        f"others; {do}"
    )


def require_order_of(names: Sequence[str], numbers: Mapping[str, int], where: str) -> None:
    """Raises ModelError if a class has another number in a data source than the model's output of that name.

    Args:
        names: of the model's outputs in their order; () where it says none.
        numbers: name of a class → its label in the source.
        where: the source, for the message.
    """
    outputs: dict[str, set[int]] = {}
    for output, name in enumerate(names):
        outputs.setdefault(_spelt(name), set()).add(output)
    for name, number in numbers.items():
        if (known := outputs.get(_spelt(name))) and number not in known:
            raise ModelError(
                f"{name!r} is class {number} of the data source {where!r} and output {min(known)} of the model: labels would be those "
                "of other classes. Set data.classes (--classes) to a file with one class name a line, in the order of the outputs: "
                f"{', '.join(names[:NAMED])}{', …' * (len(names) > NAMED)}"
            )


def _spelt(name: str) -> str:
    """A name without regard to case, and to what stands between its words."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _of_json(text: str, path: Path) -> list[tuple[str, Any]]:
    try:
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would keep the last of two equal keys
    except json.JSONDecodeError as error:
        raise DataError(f"data.classes {path} is not JSON: {error}") from None
    if (
        not isinstance(pairs, list)
        or not pairs
        or not all(isinstance(pair, tuple) and type(pair[1]) is int and pair[1] >= 0 for pair in pairs)
    ):
        raise DataError(f'data.classes {path} is not of the form {{"folder": number}}, with whole numbers from 0')
    return pairs


def _of_lines(text: str, path: Path) -> list[tuple[str, int]]:
    names = [line.strip() for line in text.rstrip().splitlines()]
    if not names:
        raise DataError(f"data.classes {path} is empty; {FORMS}")
    if "" in names:
        raise DataError(
            f"line {names.index('') + 1} of data.classes {path} is empty; line n names the folder of class n − 1"
        )
    return [(name, number) for number, name in enumerate(names)]


def _unique(pairs: Iterable[tuple[str, int]], path: Path) -> dict[str, int]:
    numbers: dict[str, int] = {}
    folders: dict[int, str] = {}
    for name, number in pairs:
        if name in numbers:
            raise DataError(f"data.classes {path} names {name!r} twice: {numbers[name]} and {number}")
        if number in folders:
            raise DataError(f"data.classes {path} gives {folders[number]!r} and {name!r} the same number {number}")
        numbers[name], folders[number] = number, name
    return numbers


def numbers_of(names: Iterable[str], classes: Mapping[str, int] | None, where: str) -> dict[str, int]:
    """Class name → label: by the class map, or without one the place in the given order.

    Raises:
        DataError: the map lacks a name; `where` says what holds it.
    """
    names = list(names)
    if classes is None:
        return {name: number for number, name in enumerate(names)}
    if unknown := [name for name in names if name not in classes]:
        raise DataError(f"data.classes does not name {listed(unknown)}, of {where}; it names {listed(classes)}")
    return {name: classes[name] for name in names}
