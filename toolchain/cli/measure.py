"""evaluate, parity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli import completion
from toolchain.cli.options import (
    FactsFile,
    ImageColumnOption,
    JsonFlag,
    LabelColumnOption,
    ShapeOption,
    numbers,
    write_result,
)
from toolchain.cli.screen import line, print_json
from toolchain.errors import ParityError, RecipeError
from toolchain.outputs import FEATURES
from toolchain.report.tables import features_lines

if TYPE_CHECKING:
    from toolchain.export.preparation import Preparation


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(evaluate)
    app.command()(parity)


PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A model folder or an ONNX file.")]
MeanOption = Annotated[
    str, typer.Option(metavar="M,M,M", help="Of pixels in 0…1, one or per channel; replaces what the artifact says.")
]
StdOption = Annotated[str, typer.Option(metavar="S,S,S", help="Likewise.")]
CropOption = Annotated[
    float | None, typer.Option(min=0.01, max=1.0, help="Share of a resized picture that the centre crop keeps.")
]
InterpolationOption = Annotated[str, typer.Option(help="How pictures are resized: bicubic, bilinear …")]


def evaluate(
    path: PathArgument,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="digits, fashion-mnist, imagefolder:PATH, images:PATH, hf:NAME[:CONFIG][@REVISION].",
            autocompletion=completion.sources,
        ),
    ],
    split: Annotated[
        str,
        typer.Option(
            help="train, calibration, validation or test; of features with labels validation or test.",
            autocompletion=completion.one_of("train", "calibration", "validation", "test"),
        ),
    ] = "test",
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="DENSE", help="Of features: what theirs are held against, the dense model folder or ONNX file."
        ),
    ] = None,
    classes: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="A class map of a classifier: which output each class folder is, e.g. imagenet-1k.",
            autocompletion=completion.class_lists,
        ),
    ] = "",
    mean: MeanOption = "",
    std: StdOption = "",
    crop_pct: CropOption = None,
    interpolation: InterpolationOption = "",
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    input_shape: ShapeOption = "",
    out: FactsFile = None,
    json_: JsonFlag = False,
) -> None:
    """Top-1 accuracy of a model folder or an ONNX file, with counts; of features their error against a reference, and k-NN counts."""
    from toolchain.artifacts import open_artifact
    from toolchain.export.accuracy import accuracy_of, features_of

    asked, shape = (
        _preparation(mean, std, crop_pct, interpolation, image_column, label_column),
        numbers(input_shape, "--input-shape"),
    )
    if reference is not None or open_artifact(path).output in FEATURES:
        if classes:
            raise RecipeError(
                "--classes maps folders to the classes of a classifier, and features have none: remove it"
            )
        judged = features_of(path, data, split, reference=reference, asked=asked, input_shape=shape)
        features = {"features": judged.features.model_dump(mode="json"), "notes": list(judged.notes)}
        against = {"reference": None if reference is None else str(reference)}
        on = f"On {data} {split}" + (":" if reference is None else f", against {reference}:")
        lines = [on, *features_lines(judged.features), *judged.notes]
        _show({"path": str(path), "data": data, "split": split, **against, **features}, lines, out, json_=json_)
        return
    evaluation = accuracy_of(path, data, split, classes=classes, asked=asked, input_shape=shape)
    accuracy = evaluation.accuracy
    facts = {
        "path": str(path),
        "data": data,
        "split": split,
        "accuracy": accuracy.accuracy,
        "wrong": accuracy.wrong,
        "total": accuracy.total,
        "notes": list(evaluation.notes),
    }
    headline = f"{accuracy.accuracy:.4f}  ({accuracy.wrong} wrong of {accuracy.total}, {data} {split})"
    _show(facts, [headline, *evaluation.notes], out, json_=json_)


def _show(facts: Mapping[str, object], lines: Sequence[str], out: Path | None, *, json_: bool) -> None:
    """Writes the facts where they were asked for, and prints them as JSON or as lines."""
    write_result(facts, out)
    if json_:
        print_json(facts)
        return
    for text in lines:
        line(text)


def parity(
    a: Annotated[Path, typer.Argument(metavar="A", help="Taken as right: a model folder or an ONNX file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Compared with it.")],
    data: Annotated[
        str, typer.Option("--data", help="A data source; seeded noise if absent.", autocompletion=completion.sources)
    ] = "none",
    mean: MeanOption = "",
    std: StdOption = "",
    crop_pct: CropOption = None,
    interpolation: InterpolationOption = "",
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    input_shape: ShapeOption = "",
    cosine_min: Annotated[
        float | None,
        typer.Option(min=-1.0, max=1.0, help="Bound on the cosine of every image, in place of what precisions allow."),
    ] = None,
    out: FactsFile = None,
    json_: JsonFlag = False,
) -> None:
    """Whether two artifacts are one and the same model, as their precisions allow; exit 3 if they are not."""
    from toolchain.export.agreement import parity_of
    from toolchain.parity import Tolerance, require

    tolerance = None if cosine_min is None else Tolerance(None, cosine_min, None, centred_min=cosine_min)
    asked = _preparation(mean, std, crop_pct, interpolation, image_column, label_column)
    agreement = parity_of(a, b, data, tolerance, asked=asked, input_shape=numbers(input_shape, "--input-shape"))
    rung = agreement.rung
    facts = {**rung.to_dict(), "notes": list(agreement.notes)}
    _show(facts, [str(rung), *agreement.notes], out, json_=json_)
    if rung.verdict == "not_run":
        raise ParityError(f"{a} and {b} were compared and not judged: {rung.reason}")
    looser = "" if rung.cosine_min is None else ", or allow them to differ so far with --cosine-min"
    require([rung], f"Make {b} again from {a}{looser}")


def _preparation(
    mean: str, std: str, crop_pct: float | None, interpolation: str, image_column: str | None, label_column: str | None
) -> Preparation:
    from toolchain.export.preparation import Preparation

    shares = _shares(mean, "--mean"), _shares(std, "--std")
    return Preparation(*shares, crop_pct, interpolation or None, image_column, label_column)


def _shares(text: str, option: str) -> tuple[float, ...] | None:
    """The numbers of an option, None if it is empty; raises RecipeError if it is not of that form."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else None
    except ValueError:
        raise RecipeError(f"{option} {text!r} is not of the form 0.5 or 0.485,0.456,0.406") from None
