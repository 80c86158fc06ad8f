"""evaluate, parity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json
from toolchain.export.logits import accuracy_of, parity_of
from toolchain.export.parity import require


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(evaluate)
    app.command()(parity)


PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A model folder or an ONNX file.")]


def evaluate(
    path: PathArgument,
    data: Annotated[str, typer.Option("--data", help="digits, fashion-mnist, imagefolder:PATH, hf:NAME.")],
    split: Annotated[str, typer.Option(help="train, calibration, validation or test.")] = "test",
    classes: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A class map: which output each class folder is, e.g. imagenet-1k.")
    ] = "",
    json_: JsonFlag = False,
) -> None:
    """Top-1 accuracy of a model folder or an ONNX file, with counts."""
    found = accuracy_of(path, data, split, classes)
    facts = {
        "path": str(path),
        "data": data,
        "split": split,
        "accuracy": found.accuracy,
        "wrong": found.wrong,
        "total": found.total,
    }
    print_json(facts) if json_ else line(
        f"{found.accuracy:.4f}  ({found.wrong} wrong of {found.total}, {data} {split})"
    )


def parity(
    a: Annotated[Path, typer.Argument(metavar="A", help="Taken as right: a model folder or an ONNX file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Compared with it.")],
    data: Annotated[str, typer.Option("--data", help="A data source; seeded noise if absent.")] = "none",
    json_: JsonFlag = False,
) -> None:
    """Whether two artifacts are one and the same model, as their precisions allow; exit 3 if they are not."""
    rung = parity_of(a, b, data)
    print_json(rung.to_dict()) if json_ else line(str(rung))
    require([rung])
