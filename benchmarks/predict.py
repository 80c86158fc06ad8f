"""How long a suite will take: MACs over the rate of this machine, or what cells of the same kind took before."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from records import Record
from suite import epochs

from toolchain.compress.method import Method
from toolchain.pipeline.job import Job
from toolchain.recipe import Recipe

EFFICIENCY = 0.3
"""Share of the matmul rate that a small ViT reaches, assumed until cells of a kind have been recorded."""
PROBES = 50_000
"""Images that pass through the model while the damage of widths is measured, at most."""
PROBE_MACS = 1e13
"""MACs that measuring damage may cost, at most."""
FORWARD_AND_BACKWARD, TEACHER = 3, 1


@dataclass(frozen=True)
class Sizes:
    """What passes over the data cost: MACs for one image, and the images of each split."""

    macs: int
    train: int
    validation: int
    test: int

    @staticmethod
    def of(job: Job) -> Sizes:
        """The sizes of a job's model and data."""
        counts = (len(job.source.split(name)) for name in ("train", "validation", "test"))
        return Sizes(job.problem.shape.macs, *counts)


def matmul_rate(seconds: float = 1.0, size: int = 512) -> float:
    """Multiply-accumulates per second of float32 matmuls on this machine, with torch's threads, now."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * size**3 / (time.perf_counter() - start)


def passes(recipe: Recipe, sizes: Sizes, *, compressed: bool = False) -> float:
    """Images × forward passes of the dense model that a cell is about; `compressed` where another cell did that part."""
    used, section = epochs(recipe), recipe.compress
    images = float(2 * sizes.validation + sizes.test)
    teacher = TEACHER if recipe.finetune.distill else 0
    images += used["recovery"] * sizes.train * (FORWARD_AND_BACKWARD + teacher)
    if compressed:
        return images
    images += used["gates"] * sizes.train * FORWARD_AND_BACKWARD
    method = Method.of(section)
    if method.closed_attention or method.closed_neurons:
        images += min(PROBES, PROBE_MACS / sizes.macs) if section.allocation == "solver" else 0
        images += 15 * recipe.data.calibration_images
    return images


def kind(recipe: Mapping[str, Any], peer: Mapping[str, Any], training: str) -> str:
    """What cells that take about as long as each other have in common, as text."""
    section, model = recipe["compress"], recipe["model"]
    method = "peer" if peer else [section[name] for name in ("attention", "neurons", "allocation")]
    gates = section["vtp"]["epochs"] if section["neurons"] == "vtp" else 0
    after = recipe["finetune"]["epochs"] if training == "recovered" else 0
    data = [recipe["data"][name] for name in ("source", "calibration_images")]
    return json.dumps([model["name"], model["kwargs"], data, method, gates, after], sort_keys=True)


def recorded_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Kind → mean seconds of the recorded cells of that kind."""
    seen: dict[str, list[float]] = {}
    for record in records:
        key = kind(record["definition"]["recipe"], record["definition"]["peer"], record["training"])
        # "load", which older records have, holds "compress" once more
        seconds = sum(spent for phase, spent in record["seconds"].items() if phase != "load")
        seen.setdefault(key, []).append(seconds)
    return {key: statistics.mean(values) for key, values in seen.items()}


def training_seconds(recipe: Recipe, sizes: Sizes, rate: float) -> float:
    """Seconds that training a reference is predicted to take."""
    assert recipe.train is not None
    images = recipe.train.epochs * sizes.train * FORWARD_AND_BACKWARD + sizes.validation + sizes.test
    return images * sizes.macs / (rate * EFFICIENCY)


def cell_seconds(recipe: Recipe, sizes: Sizes, rate: float, *, compressed: bool = False) -> float:
    """Seconds that a cell is predicted to take, from its MACs."""
    return passes(recipe, sizes, compressed=compressed) * sizes.macs / (rate * EFFICIENCY)
