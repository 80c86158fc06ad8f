"""Importance of feed-forward neurons: a new criterion is one `Criterion` and its registration in `CRITERIA`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.compress.needs import Needs
from toolchain.data import batches
from toolchain.families import UnitGroup
from toolchain.likelihood import Likelihood
from toolchain.progress import SILENT, Progress
from toolchain.recipe import CompressSection
from toolchain.registry import Registry
from toolchain.surgery.factorised import side

BATCH = 64
Scores = dict[tuple[str, str], Tensor]
"""(module, unit) → importance of each position, float64 [total]; higher is kept."""


@dataclass(frozen=True)
class Lessons:
    """Training data and settings for a criterion that trains.

    Attributes:
        images: labelled, of the training split.
        likelihood: of the outputs.
        shift_px, flip: augmentation, as in `FitConfig`.
        checkpoint, key, progress: as in `fit`.
    """

    images: Dataset[tuple[Tensor, int]]
    likelihood: Likelihood
    shift_px: int = 0
    flip: bool = False
    checkpoint: Path | None = None
    key: str = ""
    progress: Progress = SILENT


@dataclass(frozen=True)
class Evidence:
    """The inputs of a criterion.

    Attributes:
        module: the model; one that trains changes it in place.
        groups: what is scored.
        images: for calibration.
        section: [compress].
        lessons: where the criterion trains.
    """

    module: nn.Module
    groups: Sequence[UnitGroup]
    images: Dataset[tuple[Tensor, int]]
    section: CompressSection
    lessons: Lessons | None = None


def _nothing(_section: CompressSection) -> float:
    return 0.0


@dataclass(frozen=True)
class Criterion:
    """A way to choose the neurons that stay.

    Attributes:
        name: in recipes, as `compress.neurons`.
        score: the evidence → scores; None where the closed form decides, neuron by neuron.
        needs: what must be there.
        least_kept: [compress] → the least share of its neurons that a layer keeps.
        every_unit: where attention stays, it scores the units that can only be zeroed too.
    """

    name: str
    score: Callable[[Evidence], Scores] | None
    needs: Needs = Needs()  # noqa: RUF009 - frozen
    least_kept: Callable[[CompressSection], float] = _nothing
    every_unit: bool = False

    @property
    def on_noise(self) -> bool:
        """Whether it can run on noise images: it then gives the requested shapes and learns nothing."""
        return self.score is None or not (self.needs.images or self.needs.training)


@contextmanager
def _watch(module: nn.Module, linears: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls `see` with the input of each of some linears, inside the block."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, inputs: see(name, inputs[0])

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_moments(
    module: nn.Module, linears: Sequence[str], images: Dataset[tuple[Tensor, int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Linear → (mean, variance) of each of its inputs over all images and tokens, float64 [in]; in one pass, in eval mode."""
    totals: dict[str, tuple[int, Tensor, Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        flat = x.flatten(0, -2).double()  # [tokens, in]
        zero = torch.zeros(flat.shape[1]).double()
        count, total, square = totals.get(name, (0, zero, zero))
        totals[name] = (count + len(flat), total + flat.sum(0), square + flat.square().sum(0))

    with torch.no_grad(), _watch(module, linears, see):
        for batch, _ in batches(images, BATCH):
            module(batch)
    moments = {}
    for name, (count, total, square) in totals.items():
        mean = total / count
        moments[name] = mean, (square / count - mean.square()).clamp_min(0)
    return moments


def input_taylor(
    module: nn.Module, linears: Sequence[str], images: Dataset[tuple[Tensor, int]]
) -> Mapping[str, Tensor]:
    """Linear → first-order importance of each input, |Σ x·∂L/∂x| per image summed over images; float64 [in].

    L is the cross-entropy with the label, or with the model's own prediction where there is no label (−1).
    Source: Molchanov et al. 2019, "Importance estimation for neural network pruning", arXiv 1906.10771.
    """
    seen: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        x.requires_grad_().retain_grad()
        seen[name] = x

    with torch.enable_grad(), _watch(module, linears, see):
        for batch, labels in batches(images, BATCH):
            logits = module(batch)
            target = torch.where(labels < 0, logits.argmax(1), labels)
            loss = functional.cross_entropy(logits, target, reduction="sum")
            gradients = torch.autograd.grad(loss, list(seen.values()))
            for name, gradient in zip(seen, gradients, strict=True):
                score = (seen[name] * gradient).sum(tuple(range(1, gradient.ndim - 1))).abs().sum(0).double().detach()
                totals[name] = totals.get(name, torch.zeros_like(score)) + score
            seen.clear()
    return totals


def _rows(module: nn.Module, group: UnitGroup) -> Tensor:
    """Squared norm of the weights that produce each neuron, [total]."""
    total = torch.zeros(group.total, dtype=torch.float64)
    for span in group.spans:
        if span.axis == 0:
            weight = side(module, span.linear, 0)[1].weight.detach().double()
            total += weight[span.offset : span.offset + span.width].square().sum(1)
    return total


def _reader(module: nn.Module, group: UnitGroup) -> tuple[str, slice]:
    """(plain linear that reads the neurons, which of its inputs they are)."""
    span = next(span for span in group.spans if span.axis == 1)
    return side(module, span.linear, 1)[0], slice(span.offset, span.offset + span.width)


def _columns(module: nn.Module, reader: tuple[str, slice]) -> Tensor:
    """Squared norm of the column that reads each neuron, [total]."""
    name, part = reader
    return module.get_submodule(name).weight.detach().double()[:, part].square().sum(0)  # type: ignore[operator]


def magnitude(known: Evidence) -> Scores:
    """‖w_in‖·‖w_out‖ of each neuron [total]: no data."""
    module = known.module
    return {(g.module, g.unit): (_rows(module, g) * _columns(module, _reader(module, g))).sqrt() for g in known.groups}


def variance(known: Evidence) -> Scores:
    """Var(h_j)·‖W2_:j‖² [total], h what the reader W2 [D, total] reads: the output energy that is lost when a neuron is replaced by its mean."""
    readers = {(g.module, g.unit): _reader(known.module, g) for g in known.groups}
    moments = input_moments(known.module, [name for name, _ in readers.values()], known.images)
    return {key: moments[each[0]][1][each[1]] * _columns(known.module, each) for key, each in readers.items()}


def taylor(known: Evidence) -> Scores:
    """|Σ h_j·∂L/∂h_j| [total]: the first-order change of the loss when a neuron is removed; Molchanov 2019, arXiv 1906.10771."""
    readers = {(g.module, g.unit): _reader(known.module, g) for g in known.groups}
    scores = input_taylor(known.module, [name for name, _ in readers.values()], known.images)
    return {key: scores[name][part] for key, (name, part) in readers.items()}


def random(known: Evidence) -> Scores:
    """Seeded noise in [0, 1), [total]: the baseline that every criterion must beat."""
    generator = torch.Generator().manual_seed(known.section.seed)
    return {(g.module, g.unit): torch.rand(g.total, generator=generator).double() for g in known.groups}


CRITERIA: Registry[Criterion] = Registry(
    "criterion",
    "slimvit.criteria",
    {
        "obs": Criterion("obs", None, Needs(images=True)),
        "magnitude": Criterion("magnitude", magnitude),
        "variance": Criterion("variance", variance, Needs(images=True)),
        "taylor": Criterion("taylor", taylor, Needs(images=True, classes=True)),
        "random": Criterion("random", random),
        "vtp": "toolchain.compress.gates:VTP",
    },
)
