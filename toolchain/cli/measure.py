"""evaluate, parity."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from toolchain.artifact import Preprocess
from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_json
from toolchain.data import DataSource, open_source
from toolchain.errors import DataError, RecipeError
from toolchain.export.parity import TOLERANCES, require
from toolchain.export.parity import compare as compare_outputs
from toolchain.export.stage import Array, read_preprocess, stack_images, torch_call
from toolchain.surgery.replay import load_model
from toolchain.targets import get_target
from toolchain.training.evaluate import accuracy

Call = Callable[[Array], Array]


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    app.command()(evaluate)
    app.command()(parity)


PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A model folder or an ONNX file.")]


def evaluate(
    path: PathArgument,
    data: Annotated[str, typer.Option("--data", help="digits, fashion-mnist, imagefolder:PATH, hf:NAME.")],
    split: Annotated[str, typer.Option(help="train, calibration, validation or test.")] = "test",
    json_: JsonFlag = False,
) -> None:
    """Top-1 accuracy of a model folder or an ONNX file, with counts."""
    with ExitStack() as stack:
        call, preprocess = _callable(path, stack)
        source = _source(data, preprocess)
        if not source.labelled:
            raise DataError(f"the data source {data!r} has no labels; accuracy needs them")
        images = source.split(split)
        source.check_classes(call(stack_images([images[0][0]])).shape[1])
        found = accuracy(lambda batch: torch.from_numpy(call(batch.numpy())), images)
    facts = {
        "path": str(path),
        "data": data,
        "split": split,
        "accuracy": found.accuracy,
        "wrong": found.wrong,
        "total": found.total,
    }
    print_json(facts) if json_ else line(
        f"{found.accuracy:.4f}  ({found.wrong} wrong of {found.total}, {data} {split})"
    )


def parity(
    a: Annotated[Path, typer.Argument(metavar="A", help="Taken as right: a model folder or an ONNX file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Compared with it.")],
    data: Annotated[str, typer.Option("--data", help="A data source; seeded noise if absent.")] = "none",
    json_: JsonFlag = False,
) -> None:
    """Whether two artifacts are one and the same model, at batch 1 and 3; exit 3 if they are not."""
    with ExitStack() as stack:
        (expected, preprocess), (got, other) = _callable(a, stack), _callable(b, stack)
        if preprocess.input_size != other.input_size:
            raise RecipeError(f"{a} takes {preprocess.input_size}, {b} takes {other.input_size}")
        source = _source(data, preprocess)
        images = source.split("validation")
        batch = stack_images([images[index % len(images)][0] for index in range(8)])
        rung = compare_outputs(
            a.name, b.name, expected, got, batch, tolerance=TOLERANCES["fp32"], real_images=not source.synthetic
        )
    print_json(rung.to_dict()) if json_ else line(str(rung))
    require([rung])


def _callable(path: Path, stack: ExitStack) -> tuple[Call, Preprocess]:
    """(images [B, C, H, W] → logits, the preprocessing that the artifact declares)."""
    if path.is_dir():
        model = load_model(path)
        return torch_call(model.module), model.preprocess
    preprocess = read_preprocess(path)
    runner = stack.enter_context(get_target("ort-cpu").open(path, threads=torch.get_num_threads()))

    def call(images: Array) -> Array:
        return np.asarray(runner.infer({"image": images})["logits"])

    return call, preprocess


def _source(name: str, preprocess: Preprocess) -> DataSource:
    config: dict[str, Any] = {
        "mean": preprocess.mean,
        "std": preprocess.std,
        "interpolation": preprocess.interpolation,
        "crop_pct": preprocess.crop_pct,
        "crop_mode": preprocess.crop_mode or "center",
    }
    return open_source(
        name,
        input_size=preprocess.input_size,
        data_config=config,
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
    )
