"""`finetuned/`: the masked model, trained again; what was removed stays removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.files import sha256
from toolchain.model import Made, MaskedModel, TimmModel, run_stage
from toolchain.pipeline.folder import Written
from toolchain.pipeline.stages.base import Run, RunStage, open_as
from toolchain.pipeline.stages.deploy import WEIGHTS_AND_RECORD
from toolchain.records import Record
from toolchain.report.record import Figures
from toolchain.training.outcome import FinetuneFacts
from toolchain.training.stages import Finetune


class TunedFacts(Record):
    """Figures of the fine-tuned model, and what fine-tuning did."""

    figures: Figures
    finetune: FinetuneFacts


@dataclass(frozen=True)
class Finetuned(RunStage[TunedFacts]):
    """The masked model after [finetune], with the dense model as its teacher."""

    run: Run
    dense: TimmModel
    masked: MaskedModel
    name = "finetune"
    facts = TunedFacts

    @property
    def inputs(self) -> Sequence[Any]:
        job, root = self.run.job, self.run.root
        weights = [sha256(root / name / file) for name in ("dense", "masked") for file in WEIGHTS_AND_RECORD]
        return [weights, job.recipe.finetune.model_dump(mode="json"), job.source.digest, job.recipe.compress.seed]

    def work(self, key: str) -> Made[Written, TunedFacts]:
        run, recipe = self.run, self.run.job.recipe
        scratch = run.space.scratch(self.name)
        stage = Finetune(recipe.finetune, run.job.source, self.dense, recipe.compress.seed, scratch, key, run.progress)
        tuned = run_stage(stage, self.masked)
        saved = run.saved("finetuned", tuned.artifact, self.folder)
        return Made(saved.artifact, TunedFacts(figures=saved.facts, finetune=tuned.facts), saved.rungs)

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.run.root / "finetuned"

    def model(self) -> MaskedModel:
        """The model in the folder."""
        return open_as(self.folder, MaskedModel)
