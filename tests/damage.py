"""Damage as files meet it: bytes that flip, go, double or end early; JSON and TOML whose values, keys and lists are others."""

from __future__ import annotations

import copy
import json
import random
import tomllib
from collections.abc import Iterator

ODD: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 10**30, 10**400, -0.0, 1e308, 0.5),
    *("", " ", "nan", "\ud7ff", "a" * 5000, "../../x", "\0", "🐸"),
    *([], {}, [[]], {"": None}, [1, "a", None], {"a": {"a": {"a": []}}}),
)
"""Values that a key seldom has."""


def bytes_damaged(whole: bytes, seed: int) -> bytes:
    """The same bytes with one to three faults."""
    rng, data = random.Random(seed), bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 256) + 1)
        length = rng.choice((1, 1, 4, 32, len(data) // 4))
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + length]
            case 2:
                data[at:at] = data[at : at + length]
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                del data[at:]
            case _:
                data[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
    return bytes(data)


def values_damaged(whole: object, seed: int) -> object:
    """A copy of nested lists and mappings with one to three faults."""
    rng, changed = random.Random(seed), copy.deepcopy(whole)
    for _ in range(rng.randint(1, 3)):
        holders = list(_holders(changed))
        if not holders:
            return rng.choice(ODD)
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[f"{key}x"] = holder.pop(key)
            case 1:
                holder.append(holder[key])
            case 2:
                others = [each for each in holders if each is not holder]
                holder[key] = copy.deepcopy(rng.choice(others)) if others else None
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return changed


def _holders(value: object) -> Iterator[dict | list]:
    """Every mapping and list that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in list(value.values()) if isinstance(value, dict) else value:
            yield from _holders(inner)


def json_damaged(whole: bytes, seed: int) -> bytes:
    """JSON whose values are others, or in one of four cases whose bytes are."""
    if seed % 4 == 0:
        return bytes_damaged(whole, seed)
    return json.dumps(values_damaged(json.loads(whole), seed)).encode()


def toml_damaged(whole: bytes, seed: int) -> bytes:
    """TOML whose values are others, or in one of four cases whose bytes are."""
    if seed % 4 == 0:
        return bytes_damaged(whole, seed)
    changed = values_damaged(tomllib.loads(whole.decode()), seed)
    if not isinstance(changed, dict):
        return str(changed).encode("utf-8", "replace")
    return "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in changed.items()).encode("utf-8", "replace")


def _toml(value: object) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case None:
            return "nan"
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case bool() | int() | float():
            return json.dumps(value)
        case _:
            return str(value)
