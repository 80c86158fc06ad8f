"""The label-free method end to end: widths from measured damage, then the sequential pass at the best β."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.artifact import TimmModel
from toolchain.compress.allocate import Choices, Key, Limits
from toolchain.compress.damage import kl_divergence, measure
from toolchain.compress.sequential import reduce_sequentially
from toolchain.compress.solver import choose, interpolate
from toolchain.cost import ModelShape, Widths, trace
from toolchain.data import DataSource, Images, batches, read

BETAS = (0.5, 0.0, 1.0)
FINE = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0)
COARSE = (0.15, 0.3, 0.5, 0.75, 1.0)
PROBE_IMAGES = (16, 256)
"""The fewest and the most images that damage is measured on."""
MEASURE_MACS = 2e13
"""What measuring damage, and choosing β, may cost. Sizes follow from this and from shapes, never from a clock."""
Told = Callable[[float, str], None]


def _first(images: Images, count: int) -> Images:
    return images.take(torch.arange(min(count, len(images))))


def solve_widths(
    given: TimmModel, choices: Choices, dense: ModelShape, limits: Limits, source: DataSource, told: Told
) -> Widths:
    """The widths of least measured damage within the limits."""
    units = len(choices.groups)

    def images(shares: tuple[float, ...]) -> float:  # on average half of the model runs for each candidate
        return MEASURE_MACS / (len(shares) * units * 0.5 * dense.macs)

    shares = FINE if images(FINE) >= PROBE_IMAGES[0] else COARSE
    count = int(min(PROBE_IMAGES[1], max(PROBE_IMAGES[0], images(shares))))
    held_out = _first(source.split("validation"), count)
    found = measure(given.module, given.family, choices, shares, source.split("calibration"), held_out, told)
    return choose(interpolate(found, choices, FINE), choices, dense, given.groups, limits)


def reduce_closed_form(
    given: TimmModel, module: nn.Module, widths: Mapping[Key, int], source: DataSource, told: Told
) -> tuple[dict[Key, tuple[int, ...]], dict[str, Any]]:
    """(kept positions, {"beta": β, "kl": {β: divergence}}) after reducing `module` in place.

    β is chosen by the KL divergence from the dense model on validation images, labels unread; a model too large to try all
    of them takes the first.
    """
    calibration, validation = source.split("calibration"), _first(source.split("validation"), PROBE_IMAGES[1])
    size = len(calibration)
    macs = trace(given.module, given.family, given.preprocess.input_size).macs
    betas = BETAS if len(BETAS) * 5 * size * macs <= MEASURE_MACS else BETAS[:1]
    reference = logits(given.module, validation)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    best: tuple[float, dict[str, Tensor], dict[Key, tuple[int, ...]], float] | None = None
    divergences = {}
    for beta in betas:
        module.load_state_dict(start)
        kept = reduce_sequentially(
            given.module, module, given.family, given.groups, widths, calibration, beta=beta, progress=told
        )
        found = divergences[str(beta)] = kl_divergence(logits(module, validation), reference)
        if best is None or found < best[0]:
            best = found, copy.deepcopy(module.state_dict()), kept, beta
    assert best is not None
    module.load_state_dict(best[1])
    return best[2], {"beta": best[3], "kl": divergences}


@torch.no_grad()
def logits(module: nn.Module, images: Dataset[tuple[Tensor, int]]) -> Tensor:
    """[images, classes] in order."""
    return torch.cat([module(batch) for batch, _ in read(batches(images, 64))])
