"""How long a suite will take: MACs over the rate of this machine, or what cells of the same kind took before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from toolchain.compress.method import Method
from toolchain.measure.samples import SESSIONS, WARMUP_S
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


def passes(recipe: Recipe, epochs: Mapping[str, int], sizes: Sizes, *, compressed: bool = False) -> float:
    """Images × forward passes of the dense model that a compression run is about.

    Args:
        recipe: of the run.
        epochs: in which gates are learned, and of recovery.
        sizes: of its model and data.
        compressed: whether another run did that part.
    """
    section = recipe.compress
    images = float(2 * sizes.validation + sizes.test)
    teacher = TEACHER if recipe.finetune.distill else 0
    images += epochs["recovery"] * sizes.train * (FORWARD_AND_BACKWARD + teacher)
    if compressed:
        return images
    images += epochs["gates"] * sizes.train * FORWARD_AND_BACKWARD
    method = Method.of(section)
    if method.closed_attention or method.closed_neurons:
        images += min(PROBES, PROBE_MACS / sizes.macs) if section.allocation == "solver" else 0
        images += 15 * recipe.data.calibration_images
    return images


def seconds(images: float, sizes: Sizes, rate: float) -> float:
    """Seconds that so many passes of the dense model are predicted to take, from its MACs."""
    return images * sizes.macs / (rate * EFFICIENCY)


def training_seconds(recipe: Recipe, sizes: Sizes, rate: float) -> float:
    """Seconds that training a dense model is predicted to take."""
    assert recipe.train is not None
    images = recipe.train.epochs * sizes.train * FORWARD_AND_BACKWARD + sizes.validation + sizes.test
    return seconds(images, sizes, rate)


def comparison_seconds(dense_s: float, blocks: int) -> float:
    """Of a comparison that has one look, of which a call of the dense model takes `dense_s` seconds."""
    slot_s = max(0.05, (3 if dense_s < 0.1 else 2) * dense_s)
    return SESSIONS * (2 + 3 * max(WARMUP_S, 10 * dense_s) * 0.75 + blocks * 2.2 * slot_s)
