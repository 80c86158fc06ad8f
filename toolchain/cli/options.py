"""Options that several verbs share."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

from toolchain.devices.device import Device
from toolchain.errors import RecipeError
from toolchain.measure.experiment import workload_on
from toolchain.measure.samples import Workload

STDOUT = "-"
"""What --json stands for where it takes a file and is given none."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. budget.params=0.4.")
]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe.toml.")]
RecipeOption = Annotated[Path, typer.Option("--recipe", metavar="RECIPE", help="A recipe.toml.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder that a stage before wrote.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write.")]
TargetsOption = Annotated[
    Path | None,
    typer.Option(
        "--targets", metavar="FILE", help="targets.toml; if absent, that of this folder and the user's are read."
    ),
]
# What every measurement takes.
TargetOption = Annotated[str, typer.Option(help="Where to run: see `slimvit targets`.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Intra-op threads; if absent, what targets.toml says, else 1.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="First dimension of the inputs.")]
ShapeOption = Annotated[
    str, typer.Option(help="One sample in the layout of the file, e.g. 3,224,224, where it leaves that open.")
]
AffinityOption = Annotated[str, typer.Option(help="Cores to run on, e.g. 0,1; all that are allowed if absent.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Of inputs, orders and bootstrap.")]
SessionsOption = Annotated[
    int, typer.Option(min=3, help="Fresh processes; fewer than 3 do not show what processes differ by.")
]
BlocksOption = Annotated[int, typer.Option(min=4, help="Blocks a session, at first.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the result with its raw samples here.")]
JsonFile = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="[FILE.json]",
        help="Print one JSON document to stdout, or write it to a file whose name ends in .json.",
    ),
]


def workload(device: Device, threads: int | None, batch: int, input_shape: str, affinity: str) -> Workload:
    """The options as they were given, and what targets.toml says where they were not; raises as `numbers`."""
    return workload_on(
        device,
        batch=batch,
        threads=threads,
        affinity=numbers(affinity, "--affinity"),
        input_shape=numbers(input_shape, "--input-shape"),
    )


def with_lone_json(args: list[str]) -> list[str]:
    """The same arguments, with `STDOUT` after a --json that stands alone: typer's options cannot do either.

    Only what ends in .json is taken for its file, so that no artifact that follows is written over.
    """
    given: list[str] = []
    for part, following in zip_longest(args, args[1:], fillvalue="--"):
        given.append(part)
        if part == "--json" and following != STDOUT and not (following.endswith(".json") and following[0] != "-"):
            given.append(STDOUT)
    return given


def numbers(text: str, option: str) -> tuple[int, ...] | None:
    """The integers of an option, None if it is empty; raises RecipeError if it is not of that form."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else None
    except ValueError:
        example = "3,224,224" if option == "--input-shape" else "0,1"
        raise RecipeError(f"{option} {text!r} is not of the form {example}") from None
