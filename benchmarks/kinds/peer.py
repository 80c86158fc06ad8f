"""A compression run by another tool: Torch-Pruning prunes, the rest is as for slimvit's own methods."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kinds import torch_pruning
from kinds.compression import Clock, Compression, CompressionCell, shaped
from toolchain.cost import ModelShape
from toolchain.model import MaskedModel
from toolchain.pipeline.job import Job
from toolchain.progress import Progress
from toolchain.recipe import Recipe

if TYPE_CHECKING:
    from references import Ready

PREFIX = "peer."
"""Settings below this name are the other tool's, and no key of a recipe."""


class Peer(Compression):
    """Torch-Pruning, down to the parameters of `budget.params`."""

    name = "peer"

    def recipe_keys(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All but the other tool's settings and its budget."""
        own = {key: value for key, value in settings.items() if not key.startswith((PREFIX, "budget."))}
        return {**own, "compress.method": "none"}

    def other_settings(self, cell: CompressionCell, chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings below `peer.`, and the share of parameters that is left."""
        flat = {**(chosen or {}), **cell.settings}
        own = {key.removeprefix(PREFIX): value for key, value in flat.items() if key.startswith(PREFIX)}
        return {**own, "params": flat["budget.params"]}

    def other_versions(self) -> dict[str, str]:
        """Torch-Pruning's."""
        return torch_pruning.peer_version()

    def reads_labels(self, cell: CompressionCell, recipe: Recipe) -> bool:
        """Importance reads them."""
        return True

    def compressed(
        self, job: Job, settings: Mapping[str, Any], reference: Ready, work: Path, progress: Progress
    ) -> tuple[MaskedModel, dict[str, Any], dict[str, float]]:
        """Shapes of a peer have no plan to be rebuilt from, so nothing is kept: pruning again takes seconds."""
        clock = Clock()
        masked, facts = torch_pruning.prune(job.dense, job.source, torch_pruning.Settings.of(settings))
        clock.lap("compress")
        return masked, {"peer": facts, "units": {}, "pruned_shares": []}, clock.seconds

    def final(self, job: Job, masked: MaskedModel) -> tuple[nn.Module, ModelShape]:
        """The module has been cut already."""
        return shaped(masked.module.eval(), masked)


KIND = Peer()
