"""Any artifact as a function from images to logits, the images that it is judged on, and its accuracy on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from toolchain.artifact import Preprocess
from toolchain.data import DataSource, open_source
from toolchain.errors import DataError, RecipeError
from toolchain.export.calls import Call, opened, read_preprocess
from toolchain.export.onnx_graph import read_onnx
from toolchain.export.parity import BATCHES, Rung, Tolerance, compare
from toolchain.export.pixels import representable, takes_pixels
from toolchain.export.precision import (
    COMPARED,
    FP32,
    PRECISIONS,
    in_steps,
    precision_of,
    runs_on,
    tolerance_of,
)
from toolchain.export.stage import stack_images, torch_call
from toolchain.surgery.replay import load_model
from toolchain.training.evaluate import Accuracy, accuracy


@contextlib.contextmanager
def opened_logits(path: Path) -> Iterator[tuple[Call, Preprocess]]:
    """(images [B, C, H, W] → logits [B, classes], declared preprocessing) of a model folder or ONNX file, in a block.

    A folder runs in torch, a file in ONNX Runtime on the CPU, or in what can run its precision.

    Raises:
        TargetUnavailable: nothing here runs the file's precision.
        StorageError: the artifact cannot be read.
        ArtifactError: it is damaged, or an ONNX file that slimvit did not export.
    """
    if path.is_dir():
        model = load_model(path)
        yield torch_call(model.module), model.preprocess
        return
    preprocess = read_preprocess(path)
    precision = precision_of(path)
    target = "ort-cpu" if precision == FP32 else runs_on(PRECISIONS[precision])
    with opened(target, path, torch.get_num_threads()) as call:
        yield call, preprocess


def source_for(name: str, preprocess: Preprocess, classes: str = "", calibration_images: int = 512) -> DataSource:
    """The data source of that name, its images prepared as an artifact declares; raises DataError.

    Args:
        name: of the source.
        preprocess: of the artifact.
        classes: a class map, as in `open_source`.
        calibration_images: 0 where none is needed, so that too few are nobody's concern.
    """
    return open_source(
        name,
        input_size=preprocess.input_size,
        data_config={
            "mean": preprocess.mean,
            "std": preprocess.std,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": preprocess.crop_mode or "center",
        },
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
        exif_orientation=preprocess.exif_orientation,
        classes=classes,
        calibration_images=calibration_images,
    )


def accuracy_of(path: Path, data: str, split: str, classes: str = "") -> Accuracy:
    """Top-1 predictions of an artifact beside the labels of one split of a data source, which a class map may give.

    Raises:
        DataError: the source is unknown, has no labels, or does not fit.
        ModelError: the artifact has other classes than the source.
    """
    with opened_logits(path) as (call, preprocess):
        source = source_for(data, preprocess, classes, 512 if split == "calibration" else 0)
        if not source.labelled:
            raise DataError(f"the data source {data!r} has no labels; accuracy needs them")
        images = source.split(split)
        source.check_classes(call(stack_images([images[0][0]])).shape[1])
        return accuracy(lambda batch: torch.from_numpy(call(batch.numpy())), images)


def parity_of(a: Path, b: Path, data: str, tolerance: Tolerance | None = None) -> Rung:
    """The rung of two artifacts on validation images of a data source, at batch 1 and 3; A is taken as right.

    Where top-1 is judged, they are compared on `COMPARED` real images as well: three say little of it.

    Args:
        a: what is right: a model folder or an ONNX file.
        b: what is compared with it.
        data: the source.
        tolerance: what is allowed; None is what the precisions of both ask for.

    Raises:
        RecipeError: the artifacts take images of different sizes, or the source does not fit them.
    """
    with opened_logits(a) as (expected, preprocess), opened_logits(b) as (got, other):
        if preprocess.input_size != other.input_size:
            raise RecipeError(f"{a} takes {preprocess.input_size}, {b} takes {other.input_size}")
        source = source_for(data, preprocess, calibration_images=0)
        images = source.split("validation")
        allowed = tolerance or tolerance_of(a, b)
        few = source.synthetic or allowed.top1_min is None
        count = max(BATCHES) if few else max(*BATCHES, min(COMPARED, len(images)))
        batch = stack_images(source.to_compare(count))
        if any(not path.is_dir() and takes_pixels(read_onnx(path)) for path in (a, b)):
            batch = representable(batch, preprocess)
        return compare(
            a.name,
            b.name,
            in_steps(expected),
            in_steps(got),
            batch,
            tolerance=allowed,
            real_images=not source.synthetic,
            batches=sorted({*BATCHES, count}),
        )
