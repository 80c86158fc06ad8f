"""Accuracy of a model or any function from images to logits, and the divergence of a model from its dense parent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.data import batches
from toolchain.errors import DataError
from toolchain.likelihood import Likelihood, divergence_by_image

NO_CLASS = -1


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What was predicted and what was right, int64 [N] each, in the order of the data set.

    The predictions are kept so that two models can be compared image by image.
    """

    predictions: Tensor
    labels: Tensor

    @property
    def total(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def wrong(self) -> int:
        """The number of images whose top-1 prediction is not the label."""
        return int((self.predictions != self.labels).sum())

    @property
    def without_class(self) -> int:
        """The number of images for which the outputs are not finite; they count as wrong."""
        return int((self.predictions == NO_CLASS).sum())

    @property
    def accuracy(self) -> float:
        """The share of right predictions, 0..1."""
        return 1 - self.wrong / self.total


def predicted(outputs: Tensor) -> Tensor:
    """The class that outputs [B, K] name, [B]: the largest of several; of a single one, the logit of class 1, its sign.

    Outputs that are not finite name none: −1.
    """
    classes = outputs.argmax(dim=-1) if outputs.shape[-1] > 1 else (outputs[..., 0] > 0).long()
    return torch.where(outputs.isfinite().all(dim=-1), classes, NO_CLASS)


def accuracy(
    model: nn.Module | Callable[[Tensor], Tensor],
    dataset: Dataset[tuple[Tensor, int]],
    *,
    batch_size: int = 256,
) -> Accuracy:
    """Top-1 accuracy of outputs [B, K] = model(images [B, C, H, W]), as `predicted` reads them, over a labelled data set.

    A module is put into eval mode and its mode restored; images go to its device. The global random state is left
    alone.

    Raises:
        DataError: the data set is empty or has unlabelled images.
    """
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = None if parameter is None else parameter.device
    predictions, labels = [], []
    with judged(model):
        for images, batch_labels in batches(dataset, batch_size):
            predictions.append(predicted(model(images.to(device))).cpu())
            labels.append(batch_labels)
    if not labels:
        raise DataError("accuracy was asked for over an empty data set; it needs at least one labelled image")
    result = Accuracy(torch.cat(predictions), torch.cat(labels))
    if int(result.labels.min()) < 0:
        raise DataError("accuracy was asked for over unlabelled images; use a labelled data source")
    return result


def divergence(
    model: nn.Module,
    teacher: nn.Module,
    likelihood: Likelihood,
    dataset: Dataset[tuple[Tensor, int]],
    *,
    batch_size: int = 256,
) -> float:
    """The mean over images of KL(teacher ‖ model) by the likelihood of their outputs, in float64; labels are not looked at.

    Both modules are put into eval mode and their modes restored; images go to the device of each.

    Raises:
        DataError: the data set is empty.
    """
    total, count = 0.0, 0
    devices = [next(module.parameters()).device for module in (model, teacher)]
    with judged(model), judged(teacher):
        for images, _ in batches(dataset, batch_size):
            ours, theirs = (module(images.to(device)) for module, device in zip((model, teacher), devices, strict=True))
            total += float(divergence_by_image(likelihood, ours, theirs).sum())
            count += len(images)
    if not count:
        raise DataError("the divergence was asked for over an empty data set; it needs at least one image")
    return total / count


@contextmanager
def judged(model: nn.Module | Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A block without gradients and, of a module, in eval mode; every submodule's own mode is restored after it."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    for module in modes:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
