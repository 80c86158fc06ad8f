"""The recipe of a run as its report tells it, without the places of one machine."""

from __future__ import annotations

import tomlkit

from toolchain.recipe import PATH_SOURCES, PRESETS
from toolchain.report.record import Report


def recipe_of(report: Report) -> str:
    """A recipe as TOML that does the same to the same model; images and weights that lay in files are to be filled in."""
    model: dict[str, object] = {"name": report.model.name}
    if report.model.kwargs:
        model["kwargs"] = dict(report.model.kwargs)
    if report.model.checkpoint_sha256 is not None:
        model["checkpoint"] = "PATH"
    source = report.data.source.partition(":")[0] if report.data.source.startswith(PATH_SOURCES) else report.data.source
    tables: dict[str, dict[str, object]] = {
        "model": model,
        "data": {"source": f"{source}:PATH" if source in PATH_SOURCES else source},
        "compress": _method(report),
        "budget": report.budget.model_dump(mode="json", exclude_defaults=True),
    }
    precisions = [row.precision for row in report.artifacts if row.model == "compressed" and row.refused is None]
    tables["export"] = {"precisions": precisions}
    return tomlkit.dumps({name: keys for name, keys in tables.items() if keys})


def _method(report: Report) -> dict[str, object]:
    """[compress] with what its method does not imply."""
    keys = report.method.model_dump(mode="json", exclude_defaults=True)
    parts = dict(zip(("attention", "neurons", "allocation"), PRESETS.get(report.requested_method, ()), strict=False))
    return {
        "method": report.requested_method,
        **{key: value for key, value in keys.items() if key != "method" and parts.get(key) != value},
    }
