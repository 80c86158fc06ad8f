import math

import numpy as np
import pytest
import torch
from torch import nn

from toolchain.data.splits import Images
from toolchain.errors import DataError
from toolchain.likelihood import CATEGORICAL
from toolchain.training.evaluate import accuracy, divergence, predicted

LOGITS = torch.eye(5)[torch.tensor([0, 1, 2, 3, 4, 0, 0])]  # [7, 5]
LABELS = torch.tensor([0, 1, 2, 0, 0, 0, 4])


def data(labels=LABELS):
    return Images(lambda position: LOGITS[position].view(1, 1, 5), labels)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop, self.identity = nn.Dropout(1.0), nn.Linear(5, 5, bias=False)
        nn.init.eye_(self.identity.weight)

    def forward(self, images):
        assert not torch.is_grad_enabled()
        return self.drop(self.identity(images.flatten(1)))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    "model", [Flat(), lambda images: torch.from_numpy(images.numpy().astype(np.float32)).flatten(1)]
)
def test_counts_and_predictions(model, batch_size):
    result = accuracy(model, data(), batch_size=batch_size)
    assert (result.total, result.wrong) == (7, 3)
    assert result.accuracy == pytest.approx(4 / 7)
    assert result.predictions.dtype == torch.int64
    assert result.predictions.tolist() == LOGITS.argmax(1).tolist()


def test_every_modules_mode_is_restored_even_after_an_error():
    model = Flat().train()
    model.identity.eval()
    before = torch.random.get_rng_state()
    accuracy(model, data())
    assert (model.training, model.drop.training, model.identity.training) == (True, True, False)
    with pytest.raises(RuntimeError):
        accuracy(model, Images(lambda _: torch.zeros(1, 2, 2), [0]))
    assert model.drop.training
    assert torch.random.get_rng_state().equal(before)


def test_no_labels_no_accuracy():
    with pytest.raises(DataError, match="unlabelled"):
        accuracy(Flat(), data(torch.full((7,), -1)))
    with pytest.raises(DataError, match="empty"):
        accuracy(Flat(), data([]))


class Single(torch.Tensor):
    """Logits on a device without float64, as Apple's is: they can be made double only after they have left it."""

    def double(self):
        raise TypeError("this device has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


class OnSuchADevice(Flat):
    def forward(self, images):
        return super().forward(images).as_subclass(Single)


def test_divergence_is_computed_off_the_device():
    other = Flat()
    nn.init.constant_(other.identity.weight, 0.1)
    expected = divergence(other, Flat(), CATEGORICAL, data())
    assert expected > 0
    assert divergence(other, OnSuchADevice(), CATEGORICAL, data()) == expected


def test_outputs_that_are_no_numbers_name_no_class():
    """Kind: an answer that looks right. NaN must not count as class 0."""
    y = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [3.0, math.inf], [2.0, 1.0]])
    assert predicted(y).tolist() == [1, -1, -1, 0]
    assert predicted(torch.tensor([[1.0], [math.nan], [-1.0]])).tolist() == [1, -1, 0]
    found = accuracy(lambda _: y, Images(lambda _: torch.zeros(1, 1, 1), [1, 0, 0, 0]))
    assert (found.wrong, found.without_class) == (2, 2)
