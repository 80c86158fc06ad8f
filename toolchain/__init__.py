"""slimvit: compress a timm Vision Transformer, export it, build its engine, and verify what it became.

`run(recipe, out)` does everything that a recipe asks for; the stages are there as plain calls.
"""

from toolchain.artifact import DeployModel, MaskedModel, SlicedModel, TimmModel, run_stage
from toolchain.bench.compare import compare
from toolchain.compress.stage import Compress
from toolchain.errors import SlimvitError
from toolchain.export.engine import BuildEngine
from toolchain.export.stage import Export
from toolchain.job import prepare
from toolchain.pipeline import run
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.stages import Finetune, Train

__all__ = [
    "BuildEngine",
    "Compress",
    "CompressionPlan",
    "DeployModel",
    "Export",
    "Finetune",
    "MaskedModel",
    "Recipe",
    "Slice",
    "SlicedModel",
    "SlimvitError",
    "Split",
    "TimmModel",
    "Train",
    "compare",
    "load_model",
    "prepare",
    "run",
    "run_stage",
    "save_model",
]
