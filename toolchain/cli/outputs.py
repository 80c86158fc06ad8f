"""What a verb writes where an option says so: it replaces an earlier outcome alone, and nothing that the verb reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from toolchain.errors import ArtifactError, RecipeError, StorageError, fault_words
from toolchain.files import check_file_replaceable, expanded, followed, is_stream, read_json

RESULT, LISTED, OBJECT = b'{"', b"[\n", b"{\n"
"""How JSON begins: of a result, and as others read it."""
MARKDOWN = b"## slimvit gate"
JUNIT = b'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="slimvit gate"'
BILL, BUNDLE, ONNX = b'{\n  "components"', b"README.txt\0", b"\x08"
NAMED = "slimvit.outputs"
"""Where a context keeps the options that name outputs → their paths."""
TEXTS = ("model", "data", "classes")
"""Parameters that may name a path and are texts."""
MAY_BE_EMPTY = ("label_column",)
"""Parameters of which an empty value says something."""


def is_bencher(value: Any) -> bool:
    """Whether JSON is in Bencher's form, with the size of every cell, as a gate writes it."""
    return bool(value) and all(
        isinstance(cell, dict) and "file-size" in cell and all(_is_metric(metric) for metric in cell.values())
        for cell in value.values()
    )


def _is_metric(value: Any) -> bool:
    """Whether JSON is a measured value of Bencher's form."""
    return (
        isinstance(value, dict)
        and "value" in value
        and value.keys() <= {"value", "lower_value", "upper_value"}
        and all(isinstance(number, float | int) for number in value.values())
    )


def is_github_benchmark(value: Any) -> bool:
    """Whether JSON is in github-action-benchmark's form, with the size of a cell first, as a gate writes it."""
    keys = {"name", "unit", "value", "extra"}
    if not value or not all(isinstance(row, dict) and keys <= row.keys() <= keys | {"range"} for row in value):
        return False
    return str(value[0]["name"]).endswith(": size") and str(value[0]["extra"]).startswith("sha256 ")


def file(
    beginning: bytes, suffix: str = "", *, holds: Callable[[Any], bool] | None = None
) -> Callable[..., Path | None]:
    """The callback of an option that names a file to write; it refuses, before any work, what the file may not replace.

    Args:
        beginning: the first bytes of every such file; one that begins otherwise was written by something else.
        suffix: the ending that its name must have.
        holds: whether the JSON of a file that begins so is of this kind; None where the beginning tells.
    """

    def checked(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
        if value is not None:
            option, value = parameter.opts[0], expanded(value)
            if suffix and value.suffix != suffix:
                raise RecipeError(f"{option} {value} does not end in {suffix}; name a file that does")
            value = followed(value)
            check_file_replaceable(value, beginning, option)
            if holds is not None and value.is_file() and value.stat().st_size and not _is_json(value, holds):
                raise StorageError(
                    f"{option} {value} is not replaced: a file of another kind lies there; choose another name"
                )
        return _noted(context, parameter, value)

    return checked


def _is_json(path: Path, holds: Callable[[Any], bool]) -> bool:
    """Whether a file is JSON of a kind."""
    try:
        return holds(read_json(path))
    except ArtifactError:
        return False


def option(help_: str, beginning: bytes, suffix: str = "") -> Any:
    """The option `--out FILE` of a verb, with its help; the rest is that of `file`."""
    return typer.Option("--out", "-o", metavar="FILE", help=help_, callback=file(beginning, suffix))


def folder(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """The callback of an option that names a folder to write."""
    return _noted(context, parameter, value)


def _noted(context: typer.Context, parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    if value is not None:
        value = expanded(value)
        context.meta.setdefault(NAMED, {})[parameter.name] = value
    return value


def remove_earlier(*paths: Path | None) -> None:
    """Removes what an earlier command wrote to outputs, so that it cannot be read as the outcome of one that ends without any.

    Raises:
        StorageError: one cannot be removed.
    """
    for path in paths:
        if path is not None and not is_stream(path):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"cannot remove {path}: {fault_words(error)}") from error


def expand_homes(context: Any) -> None:
    """Lets `~` begin any path of a command as in `--out=~/runs/a`, where shells leave it as it is."""
    for name, value in context.params.items():
        if isinstance(value, Path):
            context.params[name] = expanded(value)
        elif isinstance(value, list):
            context.params[name] = [expanded(each) if isinstance(each, Path) else each for each in value]


def refuse_empty(parameter: Any) -> None:
    """Lets an option or argument raise RecipeError for an empty value, which as a path would be the current folder."""
    process = parameter.process_value

    def checked(context: Any, value: Any) -> Any:
        source = context.get_parameter_source(parameter.name)
        values = value if isinstance(value, list | tuple) else [value]
        if source is not None and source.name == "COMMANDLINE" and "" in values:
            rest = "" if parameter.required else ", or leave it out"
            raise RecipeError(
                f"{_option(parameter)} is empty, perhaps because a variable is not set; name a value{rest}"
            )
        return process(context, value)

    if parameter.name not in MAY_BE_EMPTY:
        parameter.process_value = checked


def require_apart(context: Any) -> None:
    """Raises RecipeError if an output of a command is what the command reads, or two of its outputs are one file."""
    outputs: Mapping[str, Path] = context.meta.get(NAMED, {})
    options = {parameter.name: _option(parameter) for parameter in context.command.params}
    places = [(name, path) for name, value in context.params.items() for path in _paths(name, value)]
    for name, output in outputs.items():
        for other, path in places:
            if name != other and not is_stream(output) and os.path.realpath(path) == os.path.realpath(output):
                what = "is written as well" if other in outputs else "is read"
                raise RecipeError(
                    f"{options[name]} {output} is also {options[other]}, which {what}; give {options[name]} another name"
                )


def _paths(name: str, value: object) -> Iterator[Path]:
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, Path):
            yield expanded(each)
        elif isinstance(each, str) and each and name in TEXTS:
            yield from (expanded(path) for path in (each, each.partition(":")[2]) if path)


def _option(parameter: Any) -> str:
    """A parameter as the help names it."""
    is_option = parameter.param_type_name == "option"
    return str(parameter.opts[0] if is_option else parameter.metavar or parameter.name.upper())
