"""The divergence between the outputs of two models, by the likelihood that belongs to the kind of output.

Everything that compression minimises, measures or imitates is the KL divergence between what the dense and the compressed
model say of an image. A new kind of output is one class here and one line in `likelihood_of`.

Legend: B images, K outputs, * positions of tokens, D width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.data import Images, batches
from toolchain.errors import DataError
from toolchain.outputs import Output

Outputs = Tensor | tuple[Tensor, ...]
"""What a model gives for a batch: [B, K] or tokens [B, *, D]; of several layers one such tensor each."""
BATCH = 64
SPREAD_FLOOR = 1e-3
"""The least spread of an output, as a share of its root mean square: one that is all but constant must not outweigh all others."""


STEPS = 5
"""Iterations between the weights and the spread of tokens; they hardly move after three."""
NOTHING_VARIES = (
    "the model's {}, so there is nothing to hold "
    "compression against: give images that differ, set data.calibration_images to 2 or more, or give weights that look at the image"
)


class Likelihood(Protocol):
    """The distribution that a model's outputs are parameters of: a tensor [B, K], or what else its class says."""

    def divergence(self, outputs: Any, reference: Any, temperature: float = 1.0) -> Tensor:
        """KL(reference ‖ outputs) of each image in nats, [B]; of a softened distribution, times T², where that has a meaning."""
        ...

    def score_loss(self, outputs: Any, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient by `outputs` is, for each image, −∇ log p(y), with y drawn from the model itself.

        The mean of its outer product is the Fisher information.
        """
        ...

    def supervised(self, outputs: Any, labels: Tensor) -> Tensor:  # noqa: ARG002
        """The mean over images of −log p(label): what is trained on labels [B].

        Only outputs that have `label_classes` have one; for all others this raises TypeError.
        """
        raise TypeError(f"{len(labels)} class labels cannot train outputs that are no classes")

    def noticed(self, error: Tensor) -> Tensor:
        """An error of outputs [B, K] without what their reader ignores; by default that is nothing."""
        return error


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One class of many: softmax."""

    def divergence(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
        ours, theirs = (functional.log_softmax(x / temperature, dim=1) for x in (outputs, reference))
        return temperature**2 * functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(1)

    def score_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator).squeeze(1)
        return functional.cross_entropy(outputs, drawn, reduction="sum")

    def supervised(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, labels)

    def noticed(self, error: Tensor) -> Tensor:
        """Softmax ignores what all classes share."""
        return error - error.mean(1, keepdim=True)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """A yes or no for each output: sigmoid. The divergence of an image is the sum over its outputs."""

    def divergence(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
        ours, theirs = outputs / temperature, reference / temperature
        each = theirs.sigmoid() * (theirs - ours) + functional.softplus(ours) - functional.softplus(theirs)
        return temperature**2 * each.sum(1)

    def score_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.bernoulli(outputs.detach().sigmoid(), generator=generator)
        return functional.binary_cross_entropy_with_logits(outputs, drawn, reduction="sum")

    def supervised(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs))


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Numbers, each with a normal distribution as wide as the dense model's own output varies over images.

    The divergence is half the squared difference in units of that variance, summed over the outputs. A temperature would
    change nothing: it cancels.

    Attributes:
        spread: standard deviation of each output over images, [K].
    """

    spread: Tensor

    @staticmethod
    def of(reference: Tensor) -> Gaussian:
        """From the dense model's outputs [B, K]; raises DataError if they are the same for every image."""
        values = reference.double()
        spread = values.std(0) if len(values) > 1 else torch.zeros(values.shape[1])
        if not bool(spread.any()):
            raise DataError(NOTHING_VARIES.format(f"outputs are the same for all {len(reference)} calibration images"))
        return Gaussian(_floored(spread, values.square().mean(0).sqrt()).to(reference.dtype))

    def divergence(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:  # noqa: ARG002
        return 0.5 * ((outputs - reference) / self.spread.to(outputs)).square().sum(1)

    def score_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator)
        return (outputs * (noise / self.spread).to(outputs)).sum()

    def supervised(self, outputs: Tensor, labels: Tensor) -> Tensor:
        raise TypeError(f"{len(labels)} class labels cannot train {outputs.shape[1]} outputs that are numbers")


def _floored(spread: Tensor, size: Tensor) -> Tensor:
    """A spread [K], at least a share of the root mean square `size`; what is 0 throughout spreads like the widest."""
    least = SPREAD_FLOOR * size.abs()
    return torch.maximum(spread, torch.where(least > 0, least, spread.max()))


@dataclass(frozen=True)
class Tokens(Likelihood):
    """Vectors at many positions, each a normal distribution of one diagonal covariance, that of the dense model's tokens.

    The divergence of an image is the mean over its tokens. A token far from all others, as DINOv2 without registers has
    them, would decide covariance and divergence alone; and by a covariance that it had widened, nothing else would be
    looked at. So none counts for more than a typical one: its squared error is weighted by how much farther it lies from
    the mean than the median token does, which leaves its relative error to count.

    Attributes:
        mean, spread: of each channel over images and positions, [D].
        typical: the median over tokens of their mean squared distance from `mean`, in units of `spread`.
    """

    mean: Tensor
    spread: Tensor
    typical: float

    @staticmethod
    def of_several(samples: Sequence[Tensor], batches: Iterable[Sequence[Tensor]]) -> tuple[Tokens, ...]:
        """One for each of several outputs, from one pass over them; raises DataError if tokens are all the same.

        Args:
            samples: of each output tokens [B, *, D] of images of every kind. What is typical is found on them, in steps:
                weights follow from a spread, and the spread from weights.
            batches: of all images, which the spread is taken over.
        """
        typical = [Tokens._typical(sample.flatten(0, -2).double()) for sample in samples]
        if not all(bool(known.spread.any()) for known in typical):
            raise DataError(NOTHING_VARIES.format("tokens are the same everywhere"))
        totals, squares = torch.zeros(len(typical)).double(), [torch.zeros_like(known.mean) for known in typical]
        for batch in batches:
            for index, (known, part) in enumerate(zip(typical, batch, strict=True)):
                rows = part.flatten(0, -2).double()
                weights = known.weights(rows)
                totals[index] += weights.sum()
                squares[index] += (weights[:, None] * (rows - known.mean).square()).sum(0)
        return tuple(
            Tokens(known.mean, _floored((away / total).sqrt(), known.mean), known.typical)
            for known, away, total in zip(typical, squares, totals, strict=True)
        )

    @staticmethod
    def _typical(rows: Tensor) -> Tokens:
        """Of rows [n, D] alone; a spread of 0 where they are all the same."""
        weights = torch.ones(len(rows), dtype=rows.dtype)
        for _ in range(STEPS):
            mean = (weights[:, None] * rows).sum(0) / weights.sum()
            spread = ((weights[:, None] * (rows - mean).square()).sum(0) / weights.sum()).sqrt()
            if not bool(spread.any()):
                return Tokens(mean, spread, 1.0)
            known = Tokens(mean, _floored(spread, mean), 1.0)
            known = replace(known, typical=float(known.distance(rows).median()) or 1.0)
            weights = known.weights(rows)
        return known

    def divergence(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:  # noqa: ARG002
        squares = ((outputs - reference) / self.spread.to(outputs)).square().sum(-1)
        damage: Tensor = 0.5 * (squares * self.weights(reference)).flatten(1).mean(1)
        return damage

    def score_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator) / self.spread.to(outputs)
        weights = self.weights(outputs.detach())[..., None]
        drawn = (outputs * (noise * weights.sqrt()).to(outputs)).sum()
        loss: Tensor = drawn / math.sqrt(math.prod(outputs.shape[1:-1]))
        return loss

    def distance(self, tokens: Tensor) -> Tensor:
        """[..., D] → [...]: mean squared distance from the mean in units of the spread."""
        return ((tokens - self.mean.to(tokens)) / self.spread.to(tokens)).square().mean(-1)

    def weights(self, tokens: Tensor) -> Tensor:
        """How much each of the dense tokens [..., D] counts, in 0…1."""
        return (self.typical / self.distance(tokens).clamp(min=self.typical)).to(tokens)


@dataclass(frozen=True)
class Several(Likelihood):
    """Independent outputs, such as the tokens of several layers; the divergence is the mean over them."""

    parts: tuple[Likelihood, ...]

    def divergence(self, outputs: Sequence[Tensor], reference: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        each = zip(self.parts, outputs, reference, strict=True)
        return torch.stack([part.divergence(y, known, temperature) for part, y, known in each]).mean(0)

    def score_loss(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        each = zip(self.parts, outputs, strict=True)
        return torch.stack([part.score_loss(y, generator) for part, y in each]).sum() / math.sqrt(len(self.parts))


CATEGORICAL = Categorical()


def likelihood_of(output: Output, module: nn.Module, images: Images) -> Likelihood:
    """The likelihood of a dense model's outputs; images are looked at only for the spread of what is no class.

    Raises:
        DataError: the outputs are numbers or features, and the same for every image.
    """
    if output in ("regression", "features"):
        return Gaussian.of(cast("Tensor", outputs_of(module, images)))
    if output in ("tokens", "layers"):
        every = map(parts_of, in_batches(module, images))
        parts = Tokens.of_several(parts_of(outputs_of(module, images.spread(BATCH))), every)
        return Several(parts) if output == "layers" else parts[0]
    return Bernoulli() if output == "multi-label" else CATEGORICAL


def divergence_by_image(likelihood: Likelihood, outputs: Outputs, reference: Outputs) -> Tensor:
    """The divergence of each image's outputs from those of the dense model, [B], in float64 on the CPU."""
    ours, theirs = (
        each.cpu().double() if isinstance(each, Tensor) else tuple(part.cpu().double() for part in each)
        for each in (outputs, reference)
    )
    return likelihood.divergence(ours, theirs)


def parts_of(outputs: Outputs) -> tuple[Tensor, ...]:
    """The tensors of what a model gives."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def joined(batches: Sequence[Outputs]) -> Outputs:
    """What a model gives for all images, from what it gives batch by batch."""
    if isinstance(batches[0], tuple):
        return tuple(torch.cat(part) for part in zip(*batches, strict=True))
    return torch.cat(cast("list[Tensor]", batches))


def in_batches(model: Callable[[Tensor], Any], images: Dataset[tuple[Tensor, int]]) -> Iterator[Any]:
    """What a module in eval mode, or any other function of images, gives batch by batch, in order, without gradients."""
    for batch, _ in batches(images, BATCH):
        with torch.no_grad():  # not around the loop: whoever reads it has a mode of its own
            outputs = model(batch)
        yield outputs


def outputs_of(model: Callable[[Tensor], Any], images: Dataset[tuple[Tensor, int]]) -> Any:
    """What a module in eval mode, or any other function of images, gives for each of them in order: `Outputs`."""
    return joined([*in_batches(model, images)])
