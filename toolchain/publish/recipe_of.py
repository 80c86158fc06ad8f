"""The recipe of a run for its card: from the run's folder, or else reconstructed from the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tomlkit
from pydantic import JsonValue

from toolchain.data.sources import SOURCES
from toolchain.errors import SlimvitError
from toolchain.places import CLASS_LISTS, HUB, HUB_URL, LOCAL, SAVED, model_source, path_of_source
from toolchain.recipe import RECIPE_FILE, Recipe
from toolchain.report.record import Report

HOLE = "PATH"
"""Placeholder for a path of one machine."""
UNKNOWN = (
    "The folder of the run held no recipe, so these parts are missing, which may not have been at their defaults: [train], "
    "[finetune], [engine] and [bench], of [model] layers and resample_patches, of [data] all but the kind of source, of "
    "[export] all but the precisions."
)
"""What a report does not say of a recipe."""


def recipe_in(folder: Path, digest: str) -> Recipe | None:
    """The recipe that lies in a run's folder; None where there is none, or it is not the one of this digest."""
    try:
        recipe = Recipe.load(folder / RECIPE_FILE) if (folder / RECIPE_FILE).is_file() else None
    except SlimvitError:
        return None
    return recipe if recipe is not None and recipe.digest == digest else None


def whole(recipe: Recipe) -> str:
    """A recipe as TOML without the places of one machine, which are to be filled in; its digest stays."""
    raw = recipe.tables()
    model, data = raw["model"], raw.get("data", {})
    if model_source(recipe.model.name)[0] == LOCAL:
        model["name"] = f"{LOCAL}:{HOLE}"
    if "checkpoint" in model:
        model["checkpoint"] = HOLE
    if "kwargs" in model:
        model["kwargs"] = _placeless(model["kwargs"])
    if path := path_of_source(recipe.data.source):
        kind = recipe.data.source.removesuffix(path)
        data["source"] = f"{kind}./{HOLE}" if kind == f"{SAVED}:" else f"{kind}{HOLE}"
    if recipe.data.classes and recipe.data.classes not in CLASS_LISTS:
        data["classes"] = HOLE
    return tomlkit.dumps(raw)


def known(report: Report, provenance: Mapping[str, JsonValue]) -> str:
    """What is known of a run's recipe, as TOML: the model, the kind of images, the method and the budget; see `UNKNOWN`.

    Args:
        report: of the run.
        provenance: of its model: where the weights came from.
    """
    model: dict[str, object] = {"name": report.model.name}
    kind, place = model_source(str(provenance.get("pretrained", "")))
    if kind == HUB:
        model["name"] = f"{HUB_URL}{place}"
    elif LOCAL in (kind, place):
        model["name"] = f"{LOCAL}:{HOLE}"
    if report.model.kwargs:
        model["kwargs"] = _placeless(report.model.kwargs)
    if report.model.checkpoint_sha256 is not None:
        model["checkpoint"] = HOLE
    elif provenance.get("weights") == "initial":
        model["pretrained"] = False
    if report.output not in ("logits", "layers"):
        model["output"] = report.output
    source = report.data.source
    usage = SOURCES[source].usage if source in SOURCES else source
    needed = usage.partition("[")[0]
    tables: dict[str, object] = {
        "model": model,
        "data": {"source": needed if ":" in needed else usage.replace("[", "").replace("]", "")},
        "compress": report.method.said(report.requested_method),
        "budget": report.budget.model_dump(mode="json", exclude_defaults=True),
        "export": {
            "precisions": [
                row.precision for row in report.artifacts if row.model == "compressed" and row.refused is None
            ]
        },
    }
    return tomlkit.dumps({name: keys for name, keys in tables.items() if keys})


def _placeless(value: object) -> object:
    """Keyword arguments without paths of one machine."""
    if isinstance(value, Mapping):
        return {key: _placeless(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(each) for each in value]
    return HOLE if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()) else value
