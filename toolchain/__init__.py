"""slimvit: compress a timm Vision Transformer, export it, build its engine, and verify what it became.

`run(recipe, out)` does everything that a recipe asks for; the stages are there as plain calls. Each name is imported when it is
first used, so that a process that only measures loads neither timm nor what compresses.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.compress.shrink import Shrunk, shrink
    from toolchain.compress.stage import Compress
    from toolchain.errors import SlimvitError
    from toolchain.export.engine import BuildEngine
    from toolchain.export.stage import Export
    from toolchain.measure.compare import compare
    from toolchain.measure.samples import Design, Workload
    from toolchain.model import DeployModel, MaskedModel, SlicedModel, TimmModel, run_stage
    from toolchain.pipeline.job import prepare
    from toolchain.pipeline.run import run
    from toolchain.plan import CompressionPlan
    from toolchain.recipe import BudgetSection, CompressSection, ExportSection, Recipe
    from toolchain.report.record import Report
    from toolchain.surgery.replay import load_model, save_model
    from toolchain.surgery.slice import Slice
    from toolchain.surgery.split import Split
    from toolchain.training.stages import Finetune, Train

__all__ = [
    "BudgetSection",
    "BuildEngine",
    "Compress",
    "CompressSection",
    "CompressionPlan",
    "DeployModel",
    "Design",
    "Export",
    "ExportSection",
    "Finetune",
    "MaskedModel",
    "Recipe",
    "Report",
    "Shrunk",
    "Slice",
    "SlicedModel",
    "SlimvitError",
    "Split",
    "TimmModel",
    "Train",
    "Workload",
    "compare",
    "load_model",
    "prepare",
    "run",
    "run_stage",
    "save_model",
    "shrink",
]

_HOME = {
    "model": ("DeployModel", "MaskedModel", "SlicedModel", "TimmModel", "run_stage"),
    "measure.compare": ("compare",),
    "measure.samples": ("Design", "Workload"),
    "compress.shrink": ("Shrunk", "shrink"),
    "compress.stage": ("Compress",),
    "errors": ("SlimvitError",),
    "export.engine": ("BuildEngine",),
    "export.stage": ("Export",),
    "pipeline.job": ("prepare",),
    "pipeline.run": ("run",),
    "plan": ("CompressionPlan",),
    "recipe": ("BudgetSection", "CompressSection", "ExportSection", "Recipe"),
    "report.record": ("Report",),
    "surgery.replay": ("load_model", "save_model"),
    "surgery.slice": ("Slice",),
    "surgery.split": ("Split",),
    "training.stages": ("Finetune", "Train"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"toolchain.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
