"""init: a recipe to start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli import completion
from toolchain.cli.options import JsonFlag
from toolchain.cli.schema import schema_of
from toolchain.cli.screen import line, print_json
from toolchain.errors import StorageError
from toolchain.files import write_text
from toolchain.shell import word

if TYPE_CHECKING:
    from toolchain.pipeline.draft import Draft

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name, hf://ORG/NAME, a checkpoint, or a folder of transformers or of timm.",
        autocompletion=completion.models,
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        help="A folder of pictures, or a source such as digits or hf:NAME.",
        autocompletion=completion.sources,
    ),
]
NameOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        help="timm's name of the model, where a checkpoint does not tell.",
        autocompletion=completion.models,
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(init)


def init(
    model: ModelArgument,
    data: DataOption,
    name: NameOption = "",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recipe to write.")] = Path(
        "recipe.toml"
    ),
    json_: JsonFlag = False,
) -> None:
    """Write a commented recipe that fits a model and images; an existing file is left alone."""
    if out.exists():
        raise StorageError(f"{out} exists; choose another name with --out")
    require_named(model, data)
    from toolchain.pipeline.draft import Draft

    write_recipe(Draft.of(model, data, {}, name=name, beside=out.parent), out)
    print_json({"path": str(out)}) if json_ else line(f"wrote {out}; next: slimvit run {word(out)}")


def require_named(model: str, data: str) -> None:
    """Refuses a model or images that are not there, before what reads them is imported, which takes seconds."""
    from toolchain.pipeline.named import require_model, require_pictures

    require_model(model)
    require_pictures(data)


def write_recipe(draft: Draft, path: Path) -> None:
    """Writes a recipe unless it is there, and beside it its class map, if it has one, and the schema that editors check it by.

    Raises:
        StorageError: another class map lies there, or a file cannot be written.
    """
    from toolchain.pipeline.draft import CLASSES_FILE, SCHEMA_FILE

    if draft.classes:
        classes, text = path.parent / CLASSES_FILE, json.dumps(draft.classes, indent=2) + "\n"
        if classes.exists() and classes.read_bytes() != text.encode():
            raise StorageError(
                f"{classes} maps classes in another way: choose another folder with --out, or remove that file"
            )
        write_text(classes, text)
    write_text(path.parent / SCHEMA_FILE, json.dumps(schema_of("recipe"), indent=2) + "\n")
    if not path.exists():
        write_text(path, draft.text(path.parent))
