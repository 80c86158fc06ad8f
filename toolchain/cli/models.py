"""models: which timm models are supported, and why the others are not."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

import timm
import torch
import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json, print_tables
from toolchain.errors import RecipeError, SlimvitError
from toolchain.families import FAMILIES, family_of
from toolchain.plan import ModelRef
from toolchain.report.tables import Table, number
from toolchain.surgery.replay import create_dense

CLASSES = 1000
"""Of a model that has no classifier of its own, to see what else it is."""


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(models)


def models(
    pattern: Annotated[str, typer.Argument(help="Wildcard over timm's names, e.g. 'deit*'.")] = "*",
    json_: JsonFlag = False,
) -> None:
    """Which timm models are supported: full, partial (with the limit), or refused (with the reason)."""
    names = [name for name in timm.list_models() if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise RecipeError(f"no timm model matches {pattern!r}; try 'deit*' or '*vit*'")
    rows = [_support(name) for name in names]
    if json_:
        print_json(rows)
        return
    rows = [row for row in rows if row["params"] is not None] or rows
    cells = tuple((r["name"], r["support"], number(r["params"]), r["reason"]) for r in rows)
    print_tables([Table("timm models", ("name", "support", "parameters", "reason"), cells, text=(0, 1, 3))])
    if len(rows) < len(names):
        line(f"{len(names) - len(rows)} more belong to no supported family; --json lists them.")


def _support(name: str) -> dict[str, Any]:
    home = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    row: dict[str, Any] = {"name": name, "module": home, "support": "refused", "reason": "", "params": None}
    if not any(home in family.timm_modules for family in FAMILIES.values()):
        return {**row, "reason": f"timm's {home} is no supported family"}
    try:
        with torch.device("meta"):
            module = create_dense(ModelRef(name=name))
            if headless := not module.num_classes:
                module = create_dense(ModelRef(name=name, kwargs={"num_classes": CLASSES}))
        row["params"] = sum(p.numel() for p in module.parameters())
        limits = family_of(module, name).restrictions(module)
    except SlimvitError as error:
        return {**row, "reason": str(error).partition(": ")[2].removesuffix(" See `slimvit models` for what is.")}
    reasons = [
        *limits,
        *(
            ["its pretrained weights have no classifier: it needs a model.checkpoint with one, or [train]"]
            if headless
            else []
        ),
    ]
    return {**row, "support": "partial" if limits else "full", "reason": "; ".join(reasons)}
