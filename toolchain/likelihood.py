"""How far the outputs of two models are apart, as the likelihood that belongs to these outputs measures it.

Everything that compression minimises, measures or imitates is the KL divergence between what the dense and the compressed
model say of an image. A new kind of output is one class here and one line in `likelihood_of`.

Legend: B images, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from toolchain.data import batches
from toolchain.errors import DataError
from toolchain.outputs import Output

BATCH = 64
SPREAD_FLOOR = 1e-3
"""The least spread of an output, as a share of its root mean square: one that is all but constant must not outweigh all others."""


class Likelihood(Protocol):
    """The distribution that a model's outputs [B, K] are parameters of."""

    def divergence(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
        """KL(reference ‖ outputs) of each image in nats, [B]; of a softened distribution, times T², where that has a meaning."""
        ...

    def score_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient by `outputs` is, for each image, −∇ log p(y), with y drawn from the model itself.

        The mean of its outer product is the Fisher information.
        """
        ...

    def supervised(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over images of −log p(label): what is trained on labels [B]; only for outputs that have `label_classes`."""
        ...

    def noticed(self, error: Tensor) -> Tensor:
        """An error of the outputs [B, K] without what their reader ignores."""
        ...


@dataclass(frozen=True)
class Categorical:
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
class Bernoulli:
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

    def noticed(self, error: Tensor) -> Tensor:
        return error


@dataclass(frozen=True)
class Gaussian:
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
            raise DataError(
                f"the model's outputs are the same for all {len(reference)} calibration images, so there is nothing to hold "
                "compression against: give images that differ, or set data.calibration_images to 2 or more"
            )
        least = SPREAD_FLOOR * values.square().mean(0).sqrt()
        spread = torch.maximum(spread, torch.where(least > 0, least, spread.max()))
        return Gaussian(spread.to(reference.dtype))

    def divergence(self, outputs: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:  # noqa: ARG002
        return 0.5 * ((outputs - reference) / self.spread.to(outputs)).square().sum(1)

    def score_loss(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(outputs.shape, generator=generator)
        return (outputs * (noise / self.spread).to(outputs)).sum()

    def supervised(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Nothing: class labels say nothing of numbers."""
        raise TypeError(f"{len(labels)} class labels cannot train {outputs.shape[1]} outputs that are numbers")

    def noticed(self, error: Tensor) -> Tensor:
        return error


CATEGORICAL = Categorical()


def likelihood_of(output: Output, module: nn.Module, images: Dataset[tuple[Tensor, int]]) -> Likelihood:
    """The likelihood of a dense model's outputs; images are looked at only for the spread of numbers.

    Raises:
        DataError: the outputs are numbers, and the same for every image.
    """
    if output == "regression":
        return Gaussian.of(outputs_of(module, images))
    return Bernoulli() if output == "multi-label" else CATEGORICAL


@torch.no_grad()
def outputs_of(model: nn.Module | Callable[[Tensor], Tensor], images: Dataset[tuple[Tensor, int]]) -> Tensor:
    """What a module in eval mode, or any other function of images, gives for each of them, [B, K], in order."""
    return torch.cat([model(batch) for batch, _ in batches(images, BATCH)])
