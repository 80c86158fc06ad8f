"""`dense/`: the model before compression; trained if the recipe asks for it, once for all recipes that share it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError, StorageError
from toolchain.files import exclusive, user_cache
from toolchain.model import Made, TimmModel, run_stage
from toolchain.pipeline.folder import Written
from toolchain.pipeline.job import Start
from toolchain.pipeline.stages.base import Run, RunStage, open_as, stage_key
from toolchain.progress import SILENT, Progress
from toolchain.report.record import Figures
from toolchain.surgery.huggingface import LAYOUTS
from toolchain.surgery.huggingface.folder import is_folder
from toolchain.surgery.replay import save_model
from toolchain.training.stages import Train

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dense(RunStage[Figures]):
    """The dense model of the recipe."""

    run: Run
    name = "dense"
    facts = Figures

    @property
    def inputs(self) -> Sequence[Any]:
        return dense_inputs(self.run.job)

    @property
    def entries(self) -> Iterable[object]:
        checkpoint = self.run.job.recipe.model.checkpoint
        return LAYOUTS.values() if checkpoint and is_folder(Path(checkpoint)) else ()

    def work(self, key: str) -> Made[Written, Figures]:
        job = self.run.job
        model = self._baseline(key) if trains(job) else job.dense
        self.run.judge.require_finite(model)
        return self.run.saved("dense", model, self.folder)

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.run.root / "dense"

    def model(self) -> TimmModel:
        """The model in the folder."""
        return open_as(self.folder, TimmModel)

    def _baseline(self, key: str) -> TimmModel:
        """The trained dense model: from the user's cache, or trained and left there for other recipes."""
        run, cached = self.run, baseline_folder(self.run.job)
        with exclusive(cached):
            if run.space.resume:
                with contextlib.suppress(ArtifactError, StorageError):
                    model = open_as(cached, TimmModel)
                    log.info("the baseline was trained before; taken from %s", cached)
                    return model
            model = trained(run.job, run.space.scratch(self.name), key, run.progress)
            save_model(model, cached)
            return model


def trains(job: Start) -> bool:
    """Whether the recipe asks for a baseline to be trained: [train], real images, and no checkpoint."""
    has_checkpoint = job.dense.provenance["weights"] == "checkpoint"
    return job.recipe.train is not None and not has_checkpoint and not job.source.synthetic


def dense_inputs(job: Start) -> list[Any]:
    """What the dense weights depend on; recipes that share it share the baseline."""
    recipe = job.recipe
    return [
        recipe.model.model_dump(mode="json"),
        job.dense.ref.model_dump(mode="json"),
        dict(job.dense.provenance),
        job.source.digest,
        recipe.compress.seed,
        [recipe.train.model_dump(mode="json"), job.source.ordered_names]
        if recipe.train is not None and trains(job)
        else None,
    ]


def trained(job: Start, checkpoint: Path | None = None, key: str = "", progress: Progress = SILENT) -> TimmModel:
    """The dense model of a job, trained if the recipe asks for it.

    Args:
        job: the recipe.
        checkpoint: resumed from if it was written under the same `key`, and written to.
        key: digest of everything that the training depends on.
        progress: told how far the training is.
    """
    if not trains(job) or job.recipe.train is None:
        return job.dense
    stage = Train(job.recipe.train, job.source, job.recipe.compress.seed, checkpoint, key, progress)
    return run_stage(stage, job.dense).artifact


def baseline_folder(job: Start) -> Path:
    """Where the user's cache keeps the dense model that a job trains."""
    return user_cache() / "dense" / stage_key("dense", dense_inputs(job))
