"""init: a recipe to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json
from toolchain.errors import StorageError
from toolchain.files import write_text

TEMPLATE = """[model]
name = "deit_small_patch16_224"

[data]
source = "imagefolder:path/to/images"   # digits | fashion-mnist | imagefolder:PATH | images:PATH | hf:NAME | none

[compress]
method = "joint"                        # joint (no labels, no training) | hybrid | vtp | none

[budget]
params = 0.5                            # the share that is LEFT

[bench]
targets = ["ort-cpu"]
"""


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(init)


def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.toml"), json_: JsonFlag = False
) -> None:
    """Write a recipe to start from; an existing file is left alone."""
    if path.exists():
        raise StorageError(f"{path} exists; choose another name")
    write_text(path, TEMPLATE)
    print_json({"path": str(path)}) if json_ else line(f"wrote {path}")
