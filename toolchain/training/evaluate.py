"""Accuracy of a model, an ONNX runner or any other function from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.data import batches, read
from toolchain.errors import DataError


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
    def accuracy(self) -> float:
        """The share of right predictions, 0..1."""
        return 1 - self.wrong / self.total


def accuracy(
    model: nn.Module | Callable[[Tensor], Tensor],
    dataset: Dataset[tuple[Tensor, int]],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Accuracy:
    """Top-1 accuracy of logits [B, K] = model(images [B, C, H, W]) over a labelled data set.

    A module is put into eval mode and its mode restored; images go to its device unless one is given. The global
    random state is left alone.

    Raises:
        DataError: the data set is empty or has unlabelled images.
    """
    if isinstance(model, nn.Module):
        modes = {module: module.training for module in model.modules()}
        device = device or next((parameter.device for parameter in model.parameters()), None)
        model.eval()
    else:
        modes = {}
    predictions, labels = [], []
    try:
        with torch.no_grad():
            for images, batch_labels in read(batches(dataset, batch_size)):
                predictions.append(model(images.to(device)).argmax(dim=-1).cpu())
                labels.append(batch_labels)
    finally:
        for module, training in modes.items():
            module.training = training
    if not labels:
        raise DataError("accuracy was asked for over an empty data set; it needs at least one labelled image")
    result = Accuracy(torch.cat(predictions), torch.cat(labels))
    if int(result.labels.min()) < 0:
        raise DataError("accuracy was asked for over unlabelled images; use a labelled data source")
    return result
