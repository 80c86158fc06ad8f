"""The accuracy of an artifact on the images of a data source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from toolchain.artifacts import Artifact, open_artifact
from toolchain.artifacts.inputs import resolved
from toolchain.errors import ArtifactError, DataError, RecipeError, SlimvitError
from toolchain.export.calls import Array, Call, Outputs, stack_images
from toolchain.export.onnx_graph import first_line
from toolchain.export.precision import opened_artifact
from toolchain.export.preparation import Preparation, prepared, resized_source
from toolchain.outputs import label_classes, output_of
from toolchain.training.evaluate import Accuracy, accuracy


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
    preprocess, notes = prepared(artifact, asked, resolved({path: artifact.image}, input_shape))
    with opened_artifact(artifact, preprocess=preprocess) as run:
        call = _explained(run, artifact)
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


def _explained(run: Outputs, artifact: Artifact) -> Call:
    """Images → the output that names classes. What a runtime raises becomes an ArtifactError."""

    def call(images: Array) -> Array:
        try:
            return run(images)[artifact.main_output]
        except SlimvitError:
            raise
        except Exception as error:  # every runtime raises its own
            raise ArtifactError(
                f"{artifact.path} cannot run on images {list(images.shape)}: {type(error).__name__}: {first_line(error)}"
            ) from error

    return call
