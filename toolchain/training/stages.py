"""The two stages that train: the dense baseline, and recovery after compression."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

from torch import nn

from toolchain.data import DataSource, Images
from toolchain.errors import DataError, ModelError, PlanError, RecipeError
from toolchain.likelihood import Likelihood, likelihood_of
from toolchain.model import Made, MaskedModel, TimmModel
from toolchain.outputs import CLASS_NAMES, WORDS
from toolchain.progress import SILENT, Progress
from toolchain.recipe import FinetuneSection, TrainSection
from toolchain.surgery.mask import baked, decisions, kept_positions
from toolchain.training.distill import distillation, imitation, supervision
from toolchain.training.evaluate import accuracy, divergence
from toolchain.training.loop import FitConfig, Loss, fit
from toolchain.training.outcome import FinetuneFacts
from toolchain.training.processes import accelerator

log = logging.getLogger(__name__)


PATCHES = "patch_embed"
"""timm's name of the layer that turns pixels into tokens."""


class Augmentation(TypedDict):
    """`FitConfig`'s fields of that."""

    shift_px: int
    flip: bool


def light_augmentation(source: DataSource, model: TimmModel | MaskedModel) -> Augmentation:
    """A shift of one pixel in 28, and a mirror where the source allows it."""
    return {"shift_px": model.preprocess.input_size[1] // 28, "flip": source.flip}


def _config(stage: Train | Finetune, given: TimmModel | MaskedModel, images: Images) -> FitConfig:
    """How both stages train: a tenth of the epochs, at most five, warm up, and the average is that of about the last quarter."""
    section = stage.section
    steps = section.epochs * math.ceil(len(images) / section.batch_size)
    return FitConfig(
        section.epochs,
        section.lr,
        section.batch_size,
        warmup_epochs=min(5.0, section.epochs / 10),
        ema_decay=max(0.0, 1 - 4 / steps),
        seed=stage.seed,
        **light_augmentation(stage.source, given),
    )


def _fit(stage: Train | Finetune, module: nn.Module, images: Images, config: FitConfig, loss: Loss | None) -> None:
    """Trains a module in place, as the stage says where its checkpoint lies and who is told."""
    fit(
        module,
        images,
        config=config,
        loss=loss,
        checkpoint=stage.checkpoint,
        key=stage.key,
        on_step=lambda step: step.tell(stage.progress),
    )


def require_labels(source: DataSource, what: str) -> None:
    """Raises DataError if a source has no labels to train on."""
    if not source.labelled:
        raise DataError(f"{what} needs labels, and the data source {source.name!r} has none")


UNTRAINED = (
    "remove it, and give the model weights by model.checkpoint or model.pretrained = true; or, to train a classifier, take model.output "
    "and model.layers out and set model.kwargs.num_classes to the number of classes"
)
"""What to do where [train] has no classes to learn."""


def require_classes(what: str, dense: TimmModel, instead: str) -> None:
    """Raises RecipeError if a model's outputs are none that labels can train; `instead` is what to do."""
    if dense.label_classes is None:
        raise RecipeError(
            f"{what} learns from labels, and the outputs are {WORDS[dense.output]}, which labels say nothing of: {instead}"
        )


def require_teacher(section: FinetuneSection, source: DataSource, dense: TimmModel) -> None:
    """Raises DataError if [finetune] has no real images, or neither labels nor the dense model to learn from."""
    if source.synthetic:
        raise DataError(f"[finetune] needs real images, and the data source {source.name!r} makes noise")
    if dense.label_classes is None and not section.distill:
        raise RecipeError(
            f"[finetune] with distill = false needs labels, and the outputs are {WORDS[dense.output]}, which labels say nothing "
            "of; set finetune.distill = true to learn from the dense model instead"
        )
    if not source.labelled and not section.distill:
        raise DataError(
            f"[finetune] with distill = false needs labels, and the data source {source.name!r} has none; "
            "set finetune.distill = true to learn from the dense model instead"
        )


@dataclass(frozen=True)
class Train:
    """TimmModel → TimmModel: the dense baseline, trained on the source's training split."""

    section: TrainSection
    source: DataSource
    seed: int = 0
    checkpoint: Path | None = None
    key: str = ""
    progress: Progress = SILENT

    def requires(self, given: TimmModel) -> None:
        """Raises DataError without labels, ModelError if the classes do not match, RecipeError where there are none."""
        require_classes("[train]", given, UNTRAINED)
        require_labels(self.source, "[train]")
        self.source.check_classes(given.label_classes)  # those that it learns, whatever its outputs stood for before

    def __call__(self, given: TimmModel) -> Made[TimmModel, None]:
        """The model, trained."""
        module = copy.deepcopy(given.module)
        images = self.source.split("train")
        config = _config(self, given, images)
        # `fit`'s own loss smooths the labels of classes
        loss = None if given.output == "logits" else supervision(likelihood_of(given.output, module, images))
        _fit(self, module, images, replace(config, label_smoothing=0.1), loss)
        provenance = {**given.provenance, "trained_on": self.source.identity}
        provenance.pop(CLASS_NAMES, None)
        if len(names := self.source.ordered_names) == module.num_classes:
            provenance[CLASS_NAMES] = list(names)
        return Made(replace(given, module=module.eval(), provenance=provenance), None)

    def ensures(self, given: TimmModel, made: TimmModel) -> None:
        """Raises DataError if training left the weights unchanged."""
        before, after = given.module.state_dict(), made.module.state_dict()
        if all(before[name].equal(after[name]) for name in before):
            raise DataError("training did not change the model")


@contextmanager
def _frozen(module: nn.Module, children: Sequence[str]) -> Iterator[None]:
    """Inside, the parameters of some children, as far as the module has them, are not trained."""
    below = tuple(f"{child}." for child in children)
    held = [value for name, value in module.named_parameters() if name.startswith(below) and value.requires_grad]
    for value in held:
        value.requires_grad_(False)
    try:
        yield
    finally:
        for value in held:
            value.requires_grad_(True)


@dataclass(frozen=True)
class Finetune:
    """MaskedModel → MaskedModel: what is left is trained; what was removed stays removed.

    Three losses, by the likelihood of the model's outputs: with labels ½·T²·KL to the teacher + ½·cross-entropy, or
    cross-entropy alone (`distill = false`);
    without them, or where the recipe says not to read any, that of `imitation`. The weights become their moving
    average, and neither dropout nor drop path acts.

    The patch embedding stays as it is: compression left it alone, and of all weights it is the easiest to spoil. Pixels next
    to each other are alike, so that small steps of one sign add up: in a DINOv2 ViT-S/14 steps of 0.001 there move the
    features eight times as far as in all linears of one kind together.

    Recovery never makes a model worse: of the given and the trained one the better on validation is returned, by
    errors where labels are read, else by the divergence from the teacher. What was found is also in the provenance of
    the model that is returned, as "finetuned".

    Attributes:
        section: [finetune].
        source: training and validation images.
        teacher: the dense model.
        seed: of order and augmentation.
        checkpoint, key: as in `fit`.
        progress: told how far training is.
        frozen: children of the model that stay as they are.
    """

    section: FinetuneSection
    source: DataSource
    teacher: TimmModel
    seed: int = 0
    checkpoint: Path | None = None
    key: str = ""
    progress: Progress = SILENT
    frozen: tuple[str, ...] = (PATCHES,)

    @property
    def reads_labels(self) -> bool:
        """Whether labels train and judge."""
        return self.source.labelled and self.section.labels

    def requires(self, given: MaskedModel) -> None:
        """Raises DataError if there is nothing to learn from, ModelError if labels or the teacher are those of another model."""
        require_teacher(self.section, self.source, self.teacher)
        if self.teacher.ref != given.ref:
            raise ModelError(
                f"the teacher is another model than the one that was compressed: {self.teacher.ref!r}, not {given.ref!r}; give the "
                "dense model that the masked one was made of"
            )
        if self.reads_labels:
            self.source.check_classes(given.label_classes, given.class_names)

    def __call__(self, given: MaskedModel) -> Made[MaskedModel, FinetuneFacts]:
        """The model, fine-tuned, or the given one if that is better on validation."""
        train, validation = self.source.split("train"), self.source.split("validation")
        if not self.reads_labels:
            train, validation = train.unlabelled(), validation.unlabelled()
        module = copy.deepcopy(given.module)
        config = _config(self, given, train)
        likelihood = likelihood_of(given.output, self.teacher.module, self.source.split("calibration"))
        name, loss = self._loss(given, likelihood)
        with _frozen(module, self.frozen):
            _fit(self, module, train, replace(config, drop=False), loss)
        before, after = (self._judge(model, validation, likelihood) for model in (given.module, module))
        better = after <= before  # not where it is not a number
        facts = FinetuneFacts(
            data=self.source.identity,
            loss=name,
            judged_by="errors" if self.reads_labels else "divergence",
            images=len(validation),
            before=before if math.isfinite(before) else None,
            after=after if math.isfinite(after) else None,
            kept="after" if better else "before",
        )
        if not better and accelerator().is_main_process:
            how = (facts.judged_by, after, before)
            log.warning("fine-tuning made validation worse (%s %g, before %g); the model before it is kept", *how)
        provenance = {**given.provenance, "finetuned": facts.model_dump(mode="json")}
        kept = replace(given, module=module.eval() if better else given.module, provenance=provenance)
        return Made(kept, facts)

    def _judge(self, module: nn.Module, validation: Images, likelihood: Likelihood) -> float:
        """How bad a model is: the number of its errors, or its mean divergence from the teacher."""
        device = accelerator().device
        module = copy.deepcopy(module).to(device)
        if self.reads_labels:
            return accuracy(module, validation).wrong
        return divergence(module, copy.deepcopy(self.teacher.module).to(device), likelihood, validation)

    def _loss(self, given: MaskedModel, likelihood: Likelihood) -> tuple[str, Loss]:
        """(name, loss) of what is learned from."""
        if self.reads_labels and not self.section.distill:
            return "cross-entropy", supervision(likelihood)
        teacher = copy.deepcopy(self.teacher.module)
        if self.reads_labels:
            return "distillation", distillation(teacher, likelihood)
        last = given.family.blocks(given.module)[-1].path
        return "imitation", imitation(teacher, likelihood, last, given.family.read_tokens(given.module))

    def ensures(self, given: MaskedModel, made: MaskedModel) -> None:
        """Raises PlanError if a removed position is no longer zero."""
        plain = baked(made.module)
        for (name, axis), kept in kept_positions(plain, decisions(given.plan, given.groups)).items():
            weight = plain.get_submodule(name).weight
            if bool(weight.index_select(axis, (~kept).nonzero().squeeze(1)).any()):  # type: ignore[operator]
                raise PlanError(f"{name}: fine-tuning moved a removed position")
