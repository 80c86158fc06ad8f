"""The accuracy of an artifact, or how good its features are, on the images of a data source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from toolchain.artifacts import Artifact, open_artifact
from toolchain.artifacts.inputs import resolved
from toolchain.errors import ArtifactError, DataError, OutputsUnfit, RecipeError, SlimvitError
from toolchain.export.calls import Array, Outputs, stack_images, step_of, tensor_call
from toolchain.export.precision import opened_artifact
from toolchain.export.preparation import Preparation, prepared, resized_source
from toolchain.foreign import first_line
from toolchain.model import Preprocess
from toolchain.outputs import FEATURES, LAYER, WORDS, label_classes, output_of
from toolchain.training.evaluate import Accuracy, accuracy
from toolchain.training.features import FeatureJudge
from toolchain.training.outcome import Features

G = TypeVar("G")
SEARCHED = ("train", "calibration")
"""Splits in which nearest neighbours are searched; their images cannot be judged by those neighbours."""


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of an artifact.

    Attributes:
        accuracy: its predictions beside the labels.
        notes: one sentence for each thing that was assumed of it or replaced in what it says.
        content, pictures: as of the source, and of the split that it was judged on.
    """

    accuracy: Accuracy
    notes: tuple[str, ...]
    content: str
    pictures: str


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
        raise OutputsUnfit(
            f"{path} gives {WORDS[artifact.output]}, which have no accuracy; `slimvit evaluate` judges them by their neighbours, "
            "a gate by relation.features"
        )
    if why := artifact.choices.get(artifact.main_output):
        raise OutputsUnfit(
            f"{path} gives {why}, in its output {artifact.main_output!r}: name a file that gives the scores of all classes"
        )
    preprocess, notes = prepared(artifact, asked, resolved({path: artifact.image}, input_shape))
    with opened_artifact(artifact, preprocess, step_of(artifact)) as run:
        call = _explained(run, artifact, lambda outputs: outputs[artifact.main_output])
        source = resized_source(data, preprocess, asked, classes, 512 if split == "calibration" else 0)
        if not source.labelled:
            raise DataError(f"the data source {data!r} has no labels; accuracy needs them")
        images = source.split(split)
        first = call(stack_images([images[0][0]]))
        if first.ndim != 2 or len(first) != 1:
            raise OutputsUnfit(
                f"{path} gives an output of shape {list(first.shape)}, which is no [batch, classes]: name a file that gives one row of scores an image"
            )
        classes_of = label_classes(output_of(artifact.output, first.shape[1]), first.shape[1])
        source.check_classes(classes_of, artifact.class_names)
        source = source.order_noted(artifact.class_names)
        result = accuracy(lambda batch: torch.from_numpy(call(batch.numpy())), images)
    if result.without_class:
        raise ArtifactError(
            f"{path} gives NaN or infinity for {result.without_class} of {result.total} images, so that it has no accuracy"
        )
    left = _left([artifact], [(artifact.main_output,)])
    return Evaluation(result, (*left, *notes, *artifact.notes), source.content, source.pictures(split))


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
        RecipeError: one gives no features, both give other outputs or prepare images in other ways, or neighbours would be looked
            for among the images that they are asked of.
        ArtifactError: it does not say how its input is preprocessed, cannot run, or gives no numbers.
    """
    artifacts = [open_artifact(each) for each in (path, reference) if each is not None]
    for each in artifacts:
        _require_features(each)
    names, notes = paired_outputs(*artifacts)
    preprocess, assumed = _prepared_for_both(artifacts, asked, input_shape)
    source = resized_source(data, preprocess, asked, "", 512 if split == "calibration" else 0)
    if reference is None and not source.labelled:
        raise DataError(
            f"the data source {data!r} has no labels, and there is nothing to hold the features of {path} against; "
            "name the dense model with --reference, or a source with labels"
        )
    voting = source.labelled and neighbours and split not in SEARCHED
    if source.labelled and neighbours and not voting:
        why = f"neighbours are looked for in the training images, which hold {split}"
        if reference is None:
            raise RecipeError(f"{why}: name --split validation or test, or the dense model with --reference")
        assumed.append(f"k-NN is not counted: {why}.")
    with ExitStack() as stack:
        calls = [
            _explained(
                stack.enter_context(opened_artifact(each, preprocess, step_of(each))),
                each,
                partial(_chosen, wanted),
            )
            for each, wanted in zip(artifacts, names, strict=True)
        ]
        images = source.split(split)
        _require_one_shape(artifacts, names, [call(stack_images([images[0][0]])) for call in calls])
        ours, *theirs = map(tensor_call, calls)
        judge = FeatureJudge(
            theirs[0] if theirs else None, images, source.split("train") if voting else None, names[-1]
        )
        features = judge(ours, str(path))
    return FeatureEvaluation(features, (*notes, *assumed, *(note for each in artifacts for note in each.notes)))


def _chosen(names: Sequence[str], outputs: dict[str, Array]) -> tuple[Array, ...]:
    return tuple(outputs[name] for name in names)


def _require_features(artifact: Artifact) -> None:
    if artifact.output is not None and artifact.output not in FEATURES:
        raise OutputsUnfit(
            f"{artifact.path} gives {WORDS[artifact.output]}, which are no features: judge it by its accuracy, without a reference"
        )


def paired_outputs(*artifacts: Artifact) -> tuple[list[tuple[str, ...]], list[str]]:
    """(the outputs of each that are judged, one for one, a sentence on each choice among several).

    Of slimvit's own files all layers, or the one output; of another's those that are called as the other artifact's, else the first.

    Raises:
        RecipeError: one has outputs that the other lacks.
    """
    names = [_features_in(each) for each in artifacts]
    if len(artifacts) == 2:
        for mine, other in ((0, 1), (1, 0)):
            if artifacts[mine].output is None and all(name in artifacts[mine].ranks for name in names[other]):
                names[mine] = names[other]
        if len(names[0]) != len(names[1]) or (len(names[0]) > 1 and names[0] != names[1]):
            raise OutputsUnfit(
                " and ".join(
                    f"{each.path} gives {', '.join(part)}" for each, part in zip(artifacts, names, strict=True)
                )
                + ": name a reference with the same outputs"
            )
    return names, _left(artifacts, names)


def _left(artifacts: Sequence[Artifact], names: Sequence[tuple[str, ...]]) -> list[str]:
    """A sentence on each artifact that has outputs which are not judged, beside those that are."""
    return [
        f"Of {each.path.name}, {', '.join(part)} is judged, and not {', '.join(left)}."
        for each, part in zip(artifacts, names, strict=True)
        if (left := [name for name in each.ranks if name not in part])
    ]


def _features_in(artifact: Artifact) -> tuple[str, ...]:
    layers = tuple(name for name in artifact.ranks if name.startswith(LAYER))
    return layers if artifact.output == "layers" and layers else (artifact.main_output,)


def _require_one_shape(
    artifacts: Sequence[Artifact], names: Sequence[tuple[str, ...]], outputs: Sequence[tuple[Array, ...]]
) -> None:
    """Raises RecipeError unless all give one row per image, and for one image the same shapes, output for output."""
    for artifact, each in zip(artifacts, outputs, strict=True):
        if bad := [list(part.shape) for part in each if part.ndim < 2 or len(part) != 1]:
            raise OutputsUnfit(
                f"{artifact.path} gives an output of shape {bad[0]} for one image, which is no [batch, …, D]"
            )
    for called, parts in zip(zip(*names, strict=True), zip(*outputs, strict=True), strict=True):
        if len({part.shape for part in parts}) > 1:
            raise OutputsUnfit(
                " and ".join(
                    f"{artifact.path} gives {name} {list(part.shape[1:])}"
                    for artifact, name, part in zip(artifacts, called, parts, strict=True)
                )
                + " for an image: features of two shapes cannot be compared"
            )


def _prepared_for_both(
    artifacts: Sequence[Artifact], asked: Preparation, input_shape: tuple[int, ...] | None
) -> tuple[Preprocess, list[str]]:
    """(how images are prepared, a sentence for each thing assumed): as all that say it say; one that does not is given the same.

    Raises:
        RecipeError: they say different things.
        ArtifactError: none says it, and it was not asked for.
    """
    size = resolved({each.path: each.image for each in artifacts}, input_shape)
    saying = [each for each in artifacts if each.preprocess is not None] or artifacts[:1]
    ways = [prepared(each, asked, size) for each in saying]
    (first, _), *others = ways
    for artifact, (how, _) in zip(saying[1:], others, strict=True):
        if how != first:
            fields = [name for name, value in vars(how).items() if value != getattr(first, name)]
            raise RecipeError(
                f"{saying[0].path} and {artifact.path} prepare images in other ways ({', '.join(fields)}), so that their features "
                "are those of other images. Name --mean, --std, --crop-pct and --interpolation for both."
            )
    silent = [each.path.name for each in artifacts if each not in saying]
    said = [
        f"{name} does not say how images are prepared: it is given those of {saying[0].path.name}." for name in silent
    ]
    return first, [*dict.fromkeys(note for _, part in ways for note in part), *said]


def _explained(run: Outputs, artifact: Artifact, choose: Callable[[dict[str, Array]], G]) -> Callable[[Array], G]:
    """Images → what is chosen of the outputs. What a runtime raises becomes an ArtifactError."""

    def call(images: Array) -> G:
        try:
            return choose(run(images))
        except SlimvitError:
            raise
        except Exception as error:  # every runtime raises its own
            raise ArtifactError(
                f"{artifact.path} cannot run on images {list(images.shape)}: {first_line(error)}"
            ) from error

    return call
