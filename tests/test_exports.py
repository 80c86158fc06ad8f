"""What a session keeps of torch's exports is read only for a model that is exported alike."""

from __future__ import annotations

import pytest
import torch
from exports import digest
from torch import nn


class Pair(nn.Module):
    """Two layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(values))


def pair(*, tied: bool = False) -> Pair:
    torch.manual_seed(0)
    made = Pair()
    made.second.load_state_dict(made.first.state_dict())
    if tied:
        made.second.weight = made.first.weight
    return made


def scaled(scale: float):
    return lambda _, values: scale * values


def test_models_that_are_alike_are_exported_once():
    assert digest(pair()) == digest(pair()) is not None
    assert digest(pair(tied=True)) == digest(pair(tied=True)) is not None


@pytest.mark.parametrize("patched", [Pair, nn.Linear])
def test_a_patched_method_is_exported_anew(monkeypatch: pytest.MonkeyPatch, patched: type[nn.Module]):
    found = [digest(pair())]
    for scale in (2.0, 3.0):
        monkeypatch.setattr(patched, "forward", scaled(scale))
        found.append(digest(pair()))
    assert len({*found} - {None}) == 3
    monkeypatch.undo()
    assert digest(pair()) == found[0]


def test_weights_that_are_one_are_told_from_equal_ones():
    assert digest(pair(tied=True)) != digest(pair())
