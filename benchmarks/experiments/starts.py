"""The dense models that ideas are tried on, how what becomes of them is judged, and where that is recorded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import compressing
import inputs
import references
import torch
from inputs import Inputs
from judging import Pictures, judged, relative, tokens_of
from kinds.compression import evaluated
from records import UNALIGNED, Record, Results, here, today, versions
from suite import Suite
from torch import Tensor, nn

from toolchain.compress.problem import Problem
from toolchain.files import digest_of, sha256
from toolchain.pipeline.job import Job, prepare
from toolchain.recipe import BudgetSection, Recipe

NAME, RESULTS = "experiments", Path(__file__).resolve().parents[1] / "results"
REFERENCES = {"fm17_s3": ("latency", "fm17", 3), "fm50_s0": ("paper", "fm50", 0)}
"""Shipped dense model → the suite that has its recipe, its name there, and its seed."""
BACKBONE = "dinov2"
IMAGES = 2048
"""Calibration images of Fashion-MNIST, as in the suites."""


class Judge(Protocol):
    """What becomes of each image; what is chosen looks at "validation" or "tuning" alone."""

    def __call__(self, module: nn.Module) -> dict[str, Any]:
        """Of a classifier what `evaluated` says of each split, of a backbone what `judged` says of each set, with "names"."""
        ...


@dataclass(frozen=True)
class Start:
    """A dense model with its data.

    Attributes:
        name: of the model.
        job: its recipe, looked at whole, for half of the parameters.
        weights: digest of its weights.
        by_image: what becomes of each image.
    """

    name: str
    job: Job
    weights: str
    by_image: Judge

    def judge(self, module: nn.Module) -> dict[str, Any]:
        """How good a module is: figures by the name of a set."""
        return figures(self.by_image(module))


def figures(by_image: Mapping[str, Any]) -> dict[str, Any]:
    """What is left where images do not count one by one: errors and divergence by split, or relative errors by set."""
    return {
        name: {key: each[key] for key in ("wrong", "total", "kl") if key in each}
        if "total" in each
        else {part: relative(each[part]) for part in ("class", "patches")}
        for name, each in by_image.items()
    }


def within(problem: Problem, params: float) -> Problem:
    """The problem within another share of the parameters."""
    return replace(problem, request=BudgetSection(params=params)).at(problem.costs)


def start(name: str, work: Path, images: int = IMAGES) -> Start:
    """A reference that is shipped, calibrated on `images`, or the pretrained backbone, which is fetched below `work`."""
    if name == BACKBONE:
        return _backbone(inputs.pretrained(work / "real"))
    suite, reference, seed = REFERENCES[name]
    recipe = Suite.load(Path(f"{suite}")).reference_recipe(reference, seed)
    weights = references.SHIPPED / name / "model.safetensors"
    raw = recipe.model_dump(mode="json")
    job = prepare(
        Recipe.from_dict(
            {
                "model": {**raw["model"], "checkpoint": str(weights)},
                "data": {"source": raw["data"]["source"], "calibration_images": images},
                **_method(seed),
            }
        )
    )

    return Start(name, job, sha256(weights), lambda module: evaluated(module, job.dense.module, job.source))


def _method(seed: int) -> dict[str, Any]:
    return {"compress": {"method": "joint", "align": UNALIGNED, "seed": seed}, "budget": {"params": 0.5}}


def _backbone(given: Inputs) -> Start:
    data = {"source": given.source, "calibration_images": compressing.SEEN}
    raw = {"model": given.model_of("features"), "data": data, **_method(0)}
    job = compressing.narrowed(prepare(Recipe.from_dict(raw)))
    sets = {name: Pictures.of(given.pictures / name, job.dense.preprocess) for name in ("tuning", "judge", "drawings")}
    dense: dict[str, Tensor] = {}

    def by_image(module: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, pictures in sets.items():
            if name not in dense:
                dense[name] = tokens_of(job.dense.module, pictures.images)
            errors = judged(tokens_of(module, pictures.images), dense[name], pictures.images.labels)
            found[name] = {"names": list(pictures.names), **errors}
        return found

    return Start(BACKBONE, job, given.weights_sha256, by_image)


def defined(begun: Start, definition: Mapping[str, Any]) -> dict[str, Any]:
    """What an experiment on one model is about."""
    return {
        "model": begun.name,
        "weights_sha256": begun.weights,
        "data_sha256": begun.job.source.digest,
        "calibration_images": len(begun.job.source.split("calibration")),
        "seed": begun.job.recipe.compress.seed,
        "threads": torch.get_num_threads(),
        **definition,
    }


def earlier(kind: str, begun: Start, definition: Mapping[str, Any]) -> Record | None:
    """The record that is there, if it is about the same; else None."""
    old = Results(RESULTS).read(NAME, f"{kind}.{begun.name}")
    return old if old is not None and old.definition == defined(begun, definition) else None


def record(
    kind: str, begun: Start, definition: Mapping[str, Any], result: Mapping[str, Any], seconds: Mapping[str, float]
) -> Record:
    """Writes what an experiment on one model found."""
    about = defined(begun, definition)
    made = Record(
        suite=NAME,
        cell=f"{kind}.{begun.name}",
        kind=kind,
        key=digest_of(kind, about, versions()),
        definition=about,
        result=dict(result),
        machine=here(),
        date=today(),
        versions=versions(),
        seconds=dict(seconds),
    )
    return Results(RESULTS).save(made)


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of every experiment."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", choices=[*REFERENCES, BACKBONE])
    parser.add_argument("--work", type=Path, default=RESULTS.with_name("work"), help="where fetched inputs are kept")
    parser.add_argument("--images", type=int, default=IMAGES, help="calibration images of Fashion-MNIST")
    parser.add_argument("--budgets", type=float, nargs="+", help="shares of the parameters that may be left")
    return parser
