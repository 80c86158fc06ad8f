"""The accuracy of an artifact, or how good its features are, on the images of a data source."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from toolchain.artifacts import Artifact, open_artifact
from toolchain.artifacts.inputs import resolved
from toolchain.errors import ArtifactError, DataError, RecipeError, SlimvitError
from toolchain.export.calls import Array, Outputs, judged, stack_images, tensor_call
from toolchain.export.onnx_graph import first_line
from toolchain.export.precision import opened_artifact
from toolchain.export.preparation import Preparation, prepared, resized_source
from toolchain.outputs import FEATURES, WORDS, label_classes, output_of
from toolchain.training.evaluate import Accuracy, accuracy
from toolchain.training.features import FeatureJudge, Features

G = TypeVar("G")


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of an artifact, and one sentence for each thing that was assumed of it or replaced in what it says."""

    accuracy: Accuracy
    notes: tuple[str, ...]


def accuracy_of(
    path: Path,
    data: str,
    split: str,
    *,
    classes: str = "",
    asked: Preparation = Preparation(),  # noqa: B008 - frozen
    input_shape: tuple[int, ...] | None = None,
) -> Evaluation:
    """Top-1 predictions of an artifact beside the labels of one split of a data source.

    Args:
        path: a model folder or an ONNX file.
        data: the source.
        split: its split.
        classes: a class map, as in `open_source`.
        asked: how images are prepared, in place of what the artifact says or where it says nothing.
        input_shape: shape of one image in the file's own layout, where the file leaves it open.

    Raises:
        DataError: the source is unknown, has no labels, or does not fit.
        ModelError: the artifact has other classes than the source.
        ArtifactError: it does not say how its input is preprocessed, and that was not asked for either.
    """
    artifact = open_artifact(path)
    if artifact.output in FEATURES:
        raise RecipeError(
            f"{path} gives {WORDS[artifact.output]}, which have no accuracy; `slimvit evaluate` judges them by their neighbours, "
            "a gate by relation.features"
        )
    preprocess, notes = prepared(artifact, asked, resolved({path: artifact.image}, input_shape))
    with opened_artifact(artifact, preprocess=preprocess) as run:
        call = _explained(run, artifact, lambda outputs: outputs[artifact.main_output])
        source = resized_source(data, preprocess, asked, classes, 512 if split == "calibration" else 0)
        if not source.labelled:
            raise DataError(f"the data source {data!r} has no labels; accuracy needs them")
        images = source.split(split)
        first = call(stack_images([images[0][0]]))
        if first.ndim != 2 or len(first) != 1:
            raise RecipeError(f"{path} gives an output of shape {list(first.shape)}, which is no [batch, classes]")
        source.check_classes(label_classes(output_of(artifact.output, first.shape[1]), first.shape[1]))
        result = accuracy(lambda batch: torch.from_numpy(call(batch.numpy())), images)
    if result.without_class:
        raise ArtifactError(
            f"{path} gives NaN or infinity for {result.without_class} of {result.total} images, so that it has no accuracy"
        )
    return Evaluation(result, (*notes, *artifact.notes))


@dataclass(frozen=True)
class FeatureEvaluation:
    """How good the features of an artifact are, and what was assumed, as in `Evaluation`."""

    features: Features
    notes: tuple[str, ...]


def features_of(
    path: Path,
    data: str,
    split: str,
    *,
    reference: Path | None = None,
    asked: Preparation = Preparation(),  # noqa: B008 - frozen
    input_shape: tuple[int, ...] | None = None,
    neighbours: bool = True,
) -> FeatureEvaluation:
    """How near the features of an artifact are to those of another, and what the neighbours of labelled images know.

    Args:
        path: a model folder or an ONNX file.
        data: the source.
        split: its split.
        reference: the artifact that is taken as right, the dense model say; None where labels alone judge.
        asked, input_shape: as in `accuracy_of`.
        neighbours: whether they are asked, where there are labels.

    Raises:
        DataError: the source is unknown, does not fit, or has no labels where there is no reference either.
        RecipeError: neighbours would be looked for among the images that they are asked of.
        ArtifactError: it does not say how its input is preprocessed, or cannot run.
    """
    artifact = open_artifact(path)
    preprocess, notes = prepared(artifact, asked, resolved({path: artifact.image}, input_shape))
    source = resized_source(data, preprocess, asked, "", 512 if split == "calibration" else 0)
    if reference is None and not source.labelled:
        raise DataError(
            f"the data source {data!r} has no labels, and there is nothing to hold the features of {path} against; "
            "name the dense model with --reference, or a source with labels"
        )
    voting = source.labelled and neighbours
    if voting and split in ("train", "calibration"):
        raise RecipeError(f"neighbours are looked for in train, which holds {split}: name another --split")
    with ExitStack() as stack:
        artifacts = (artifact, *(() if reference is None else (open_artifact(reference),)))
        ours, *theirs = [
            tensor_call(_explained(stack.enter_context(opened_artifact(each, preprocess=preprocess)), each, judged))
            for each in artifacts
        ]
        bank = source.split("train") if voting else None
        judge = FeatureJudge(theirs[0] if theirs else None, source.split(split), bank)
        return FeatureEvaluation(judge(ours), (*notes, *artifact.notes))


def _explained(run: Outputs, artifact: Artifact, choose: Callable[[dict[str, Array]], G]) -> Callable[[Array], G]:
    """Images → what is chosen of the outputs. What a runtime raises becomes an ArtifactError."""

    def call(images: Array) -> G:
        try:
            return choose(run(images))
        except SlimvitError:
            raise
        except Exception as error:  # every runtime raises its own
            raise ArtifactError(
                f"{artifact.path} cannot run on images {list(images.shape)}: {type(error).__name__}: {first_line(error)}"
            ) from error

    return call
