"""Reads TOML files that a user writes: strict tables, errors that offer the nearest key, and amounts with units."""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from toolchain.errors import RecipeError, StorageError, fault_words
from toolchain.records import Record, place_and_fault

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


def tuple_of(value: Any) -> Any:
    """A list of TOML or JSON as a tuple; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def _numbers(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else tuple_of(value)


Names = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(tuple_of)]
Numbers = Annotated[tuple[float, ...], Field(min_length=1), BeforeValidator(_numbers)]
"""One number for all channels, or one for each."""
Counts = Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(tuple_of)]


def share_of(value: Any) -> float:
    """A share of the dense model's: 0.5 of 0.5, "0.5", "50%" or "50 %".

    Raises:
        ValueError: it is none, or not above 0 and at most 1.
    """
    text = str(value).strip()
    percent = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"is the share that is left, such as 0.5 or '50%', got {value!r}") from None
    share = number / 100 if percent else number
    if not 0 < share <= 1:
        meant = (
            f"; write {number / 100:g} or '{number:g}%' if you mean that" if 1 < number <= 100 and not percent else ""
        )
        raise ValueError(
            f"is the share that is left, above 0 and at most 1, such as 0.5 or '50%', got {value!r}{meant}"
        )
    return share


Share = Annotated[Fraction, BeforeValidator(share_of)]
"""What is left of the dense model, as a number or in per cent."""


class Section(Record):
    """A table of a file that a user writes: frozen, strict, and an unknown key is an error."""

    model_config = ConfigDict(allow_inf_nan=False)


KINDS = ("recipe", "gate", "targets", "accept")
"""What TOML files of slimvit are called."""


def _offered(folder: Path, what: str) -> Path | None:
    """The TOML file in a folder that is called what was wanted, else one that is not called something else."""
    files = sorted(folder.glob("*.toml"))
    own = (each for each in files if what.partition(" ")[0] in each.name)
    other = (each for each in files if not any(kind in each.name for kind in KINDS))
    return next(own, None) or next(other, None)


def read_toml(path: Path, what: str = "file") -> dict[str, object]:
    """The tables of a TOML file, with or without a byte order mark.

    Args:
        path: the file.
        what: what the file is to be, one of `KINDS` first: "recipe", "gate", "targets file".

    Raises:
        StorageError: it cannot be read.
        RecipeError: it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except IsADirectoryError as error:
        inside = _offered(path, what)
        hint = f"; did you mean {inside}?" if inside else f", and no {what} lies in it; name a file"
        raise StorageError(f"the {what} {path} is a folder{hint}") from error
    except FileNotFoundError as error:
        raise StorageError(f"there is no {what} {path}, seen from {Path.cwd()}; name one that is there") from error
    except OSError as error:
        raise StorageError(f"cannot read the {what} {path}: {fault_words(error)}") from error
    except UnicodeDecodeError:
        raise RecipeError(
            f"{path} is not valid TOML, since it is no text; name a {what}, and let `slimvit inspect` say what this file is"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}; correct that line, or name another {what}") from None


def parse_size(text: str) -> tuple[float, bool]:
    """(value, is_share) of "45%" → (0.45, True) or "12 MB" → (12e6, False); kB, MB, GB are powers of 1000, in any case.

    Raises:
        ValueError: the text is neither.
    """
    return _share_or(
        text, {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}, f"size {text!r}", "a size like '12 MB', in B, kB, MB or GB"
    )


def parse_latency(text: str) -> tuple[float, bool]:
    """(value, is_share) of "45%" → (0.45, True), "8 ms" → (8.0, False); also "800 us" and "1.2 s", in milliseconds.

    Raises:
        ValueError: the text is neither.
    """
    return _share_or(
        text, {"us": 1e-3, "µs".casefold(): 1e-3, "ms": 1.0, "s": 1e3}, f"latency {text!r}", "a time like '8 ms'"
    )


def _share_or(text: str, units: Mapping[str, float], what: str, example: str) -> tuple[float, bool]:
    """(value, is_share): a share of the dense model's, or an amount in one of the units."""
    number = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%|\D+)", text.strip())
    unit = number.group(2).casefold() if number else ""
    if number is None or unit not in ("%", *units):
        raise ValueError(f"{what} is neither a share like '45%' nor {example}")
    value = float(number.group(1))
    if math.isinf(value):
        raise ValueError(f"{what} is larger than any number")
    if value <= 0 or (unit == "%" and value > 100):
        raise ValueError(f"{what} must be above 0 and a share at most 100%")
    return (value / 100, True) if unit == "%" else (value * units[unit], False)


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Field name → the nested section it holds, or None."""
    nested: dict[str, type[BaseModel] | None] = {}
    for name, info in model.model_fields.items():
        options = [info.annotation, *get_args(info.annotation)]
        nested[name] = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return nested


def keys_of(root: type[BaseModel], start: str = "") -> dict[str, Any]:
    """Dotted key of a file → the type of its value, of every key of its tables; a mapping's own keys are not known."""
    keys: dict[str, Any] = {}
    for name, inner in _sections(root).items():
        path = f"{start}{name}"
        keys |= {path: root.model_fields[name].annotation} if inner is None else keys_of(inner, f"{path}.")
    return keys


def words_of(annotation: Any) -> list[str]:
    """The values that a type allows, as TOML has them without quotes, where they can be listed; else nothing."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for option in get_args(annotation) if option is not type(None) for word in words_of(option)]


_IN_A_SHELL = ", and single quotes around KEY=VALUE, or the shell takes the double quotes away"


def _as_list(value: object) -> str:
    """What was meant as a list, as TOML; of "[a, b]", what a shell leaves of a list whose quotes it took, the two names."""
    bare = value.strip().removeprefix("[").removesuffix("]") if isinstance(value, str) else value
    entries = [part.strip(" \"'") for part in bare.split(",")] if isinstance(bare, str) else [bare]
    return json.dumps([entry for entry in entries if entry != ""])


def explain(error: ValidationError, root: type[BaseModel], what: str) -> str:
    """One line for the first fault: where it is, what is wrong, and the nearest known key.

    Args:
        error: what pydantic found.
        root: the model that was validated.
        what: the kind of file, for the message.
    """
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    where, message = place_and_fault(error)
    if first["type"] == "extra_forbidden":
        section = root
        for part in path[:-1]:  # an index or the key of a mapping stays in the section that its field holds
            section = _sections(section).get(part) or section
        known = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*path[:-1], near[0]])!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown {what} key {where!r}; {hint}"
    if first["type"] == "missing":
        return f"the {what} needs {where!r}"
    got = first.get("input")
    if first["type"] in ("tuple_type", "list_type"):
        return f"{what} {where} is a list: write {_as_list(got)}{_IN_A_SHELL if str(got).startswith('[') else ''}"
    whole = isinstance(got, dict | list | tuple | bytes | BaseModel) or first["type"] in ("value_error", "json_invalid")
    shown = "" if whole else f", got {got!r}"
    return f"{what} {where or 'file'}: {message}{shown}"
