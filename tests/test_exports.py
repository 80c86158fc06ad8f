"""What a session keeps of torch's exports is read only for a model that is exported alike."""

from __future__ import annotations

import pytest
import torch
from exports import digest, once
from torch import nn

from toolchain.export.onnx_graph import strip


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


class Classifier(nn.Module):
    """A linear of all pixels, to whose weight something may be done first."""

    def __init__(self, seed: int, scale: float | None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head, self.scale = nn.Linear(12, 5), scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        weight = self.head.weight if self.scale is None else self.scale * self.head.weight
        return nn.functional.linear(image.flatten(1), weight, self.head.bias)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("scale", "exported"), [(None, 1), (2.0, 2)])
def test_a_graph_is_read_for_other_weights_where_these_stand_in_it_as_they_are(scale, exported, tmp_path):
    real, calls = torch.onnx.export.args[0], []

    def counted(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    def graph(export, seed):
        module, dynamic = Classifier(seed, scale).eval(), ({0: "batch"},)
        model = export(
            module, (torch.zeros(2, 3, 2, 2),), dynamo=True, dynamic_shapes=dynamic, verbose=False
        ).model_proto
        strip(model)
        return model.SerializeToString(deterministic=True)

    kept = once(counted, tmp_path / "kept")
    assert [graph(kept, seed) for seed in (0, 1, 0)] == [graph(real, seed) for seed in (0, 1, 0)]
    assert len(calls) == exported


def test_weights_that_are_one_are_told_from_equal_ones():
    assert digest(pair(tied=True)) != digest(pair())
