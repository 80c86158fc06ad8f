"""The two stages that train: the dense baseline, and recovery after compression."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.artifact import MaskedModel, TimmModel
from toolchain.data import DataSource
from toolchain.errors import DataError, PlanError
from toolchain.recipe import FinetuneSection, TrainSection
from toolchain.surgery.mask import baked, decisions, kept_positions
from toolchain.training.distill import distillation
from toolchain.training.evaluate import accuracy
from toolchain.training.loop import FitConfig, Progress, fit

log = logging.getLogger(__name__)
OnProgress = Callable[[Progress], None]


def light_augmentation(source: DataSource, model: TimmModel | MaskedModel) -> dict[str, int | bool]:
    """`FitConfig`'s augmentation fields: a shift of one pixel in 28, and a mirror where the source allows it."""
    return {"shift_px": model.preprocess.input_size[1] // 28, "flip": source.flip}


def require_labels(source: DataSource, what: str) -> None:
    """Raises DataError if a source has no labels to train on."""
    if not source.labelled:
        raise DataError(f"{what} needs labels, and the data source {source.name!r} has none")


@dataclass(frozen=True)
class Train:
    """TimmModel → TimmModel: the dense baseline, trained on the source's training split."""

    section: TrainSection
    source: DataSource
    seed: int = 0
    checkpoint: Path | None = None
    key: str = ""
    progress: OnProgress | None = None
    name: str = "train"

    def requires(self, given: TimmModel) -> None:
        """Raises DataError without labels, ModelError if the classes do not match."""
        require_labels(self.source, "[train]")
        self.source.check_classes(given.module.num_classes)  # type: ignore[arg-type]

    def __call__(self, given: TimmModel) -> TimmModel:
        """The model, trained."""
        module = copy.deepcopy(given.module)
        section, images = self.section, self.source.split("train")
        steps = section.epochs * math.ceil(len(images) / section.batch_size)
        config = FitConfig(
            section.epochs,
            section.lr,
            section.batch_size,
            warmup_epochs=min(5.0, section.epochs / 10),
            label_smoothing=0.1,
            ema_decay=max(0.0, 1 - 4 / steps),  # the average of about the last quarter of training
            seed=self.seed,
            **light_augmentation(self.source, given),  # type: ignore[arg-type]
        )
        fit(module, images, config=config, checkpoint=self.checkpoint, key=self.key, progress=self.progress)
        return replace(given, module=module.eval(), provenance={**given.provenance, "trained_on": self.source.identity})

    def ensures(self, given: TimmModel, made: TimmModel) -> None:
        """Raises DataError if training left the weights unchanged."""
        before, after = given.module.state_dict(), made.module.state_dict()
        if all(before[name].equal(after[name]) for name in before):
            raise DataError("training did not change the model")


@dataclass(frozen=True)
class Finetune:
    """MaskedModel → MaskedModel: what is left is trained; what was removed stays removed.

    The better of the two models on validation is returned, so recovery never makes a model worse.
    """

    section: FinetuneSection
    source: DataSource
    teacher: TimmModel
    seed: int = 0
    checkpoint: Path | None = None
    key: str = ""
    progress: OnProgress | None = None
    name: str = "finetune"

    def requires(self, given: MaskedModel) -> None:
        """Raises DataError without labels, ModelError if the classes do not match."""
        require_labels(self.source, "[finetune]")
        self.source.check_classes(given.module.num_classes)  # type: ignore[arg-type]

    def __call__(self, given: MaskedModel) -> MaskedModel:
        """The model, fine-tuned, or the given one if that is better on validation."""
        module, section = copy.deepcopy(given.module), self.section
        config = FitConfig(
            section.epochs,
            section.lr,
            section.batch_size,
            seed=self.seed,
            **light_augmentation(self.source, given),  # type: ignore[arg-type]
        )
        fit(
            module,
            self.source.split("train"),
            config=config,
            loss=distillation(copy.deepcopy(self.teacher.module)) if section.distill else None,
            checkpoint=self.checkpoint,
            key=self.key,
            progress=self.progress,
        )
        validation = self.source.split("validation")
        before, after = accuracy(given.module, validation), accuracy(module, validation)
        if after.wrong > before.wrong:
            log.warning(
                "fine-tuning made validation worse (%d wrong, before %d of %d); the model before it is kept",
                after.wrong,
                before.wrong,
                before.total,
            )
            return given
        return replace(given, module=module.eval())

    def ensures(self, given: MaskedModel, made: MaskedModel) -> None:
        """Raises PlanError if a removed position is no longer zero."""
        plain = baked(made.module)
        for (name, axis), kept in kept_positions(plain, decisions(given.plan, given.groups)).items():
            weight = plain.get_submodule(name).weight
            if bool(weight.index_select(axis, (~kept).nonzero().squeeze(1)).any()):  # type: ignore[operator]
                raise PlanError(f"{name}: fine-tuning moved a removed position")
