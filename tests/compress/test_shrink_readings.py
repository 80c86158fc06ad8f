"""Backbones with more to them than what a larger model reads: pools, classifiers, later blocks, other sizes, steps between."""

from __future__ import annotations

import pytest
import timm
import torch
from builders import STRUCTURES, named, randomise
from sweeps import swept
from torch import Tensor, nn

import toolchain
from toolchain.errors import ModelError
from toolchain.families import adapt
from toolchain.recipe import CompressSection

UNIFORM = CompressSection(allocation="uniform")
PARTS = (
    "classic",
    "distilled",
    "attention pool",
    "attention pool over registers",
    "refining pool",
    "PE",
    "parallel scaling",
    "Swin",
    "BEiT",
)
TURNED = ("dynamic size", "DINOv3", "EVA-02 base", "NaFlex rotary")


def backbone(case: str, **changes: object) -> nn.Module:
    name, kwargs = named(case)
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{**kwargs, **changes})).eval()


def pictures(*size: int, count: int = 16) -> list[Tensor]:
    return list(torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)).split(8))


class Reader(nn.Module):
    """Reads all tokens, or those after some blocks."""

    def __init__(self, body: nn.Module, indices: list[int] | None) -> None:
        super().__init__()
        self.body, self.indices = body, indices

    def forward(self, images: Tensor) -> Tensor:
        if self.indices is None:
            return self.body.forward_features(images).flatten(1)
        maps = self.body.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        return torch.cat([features.flatten(1) for features in maps], 1)


@pytest.mark.parametrize("indices", [None, [0]], ids=["all tokens", "the first block"])
@pytest.mark.parametrize("case", swept([case for case in PARTS if case in STRUCTURES], [*PARTS][::3]))
def test_what_is_not_read_stays_and_the_rest_shrinks(case: str, indices: list[int] | None):
    reader = Reader(backbone(case), indices)
    adapt(reader.body)  # names, where timm keeps parts of a linear apart
    before = {name: tensor.clone() for name, tensor in reader.body.state_dict().items()}
    size = reader.body.patch_embed.img_size
    images = torch.cat(pictures(*size))
    wanted = reader(images)
    toolchain.shrink(reader, pictures(*size), params=0.85, at="body", compress=UNIFORM)
    error = (reader(images) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert 0 < error < 0.7
    after = reader.body.state_dict()
    changed = [name for name, tensor in before.items() if name not in after or not torch.equal(tensor, after[name])]
    stage = "layers." if case == "Swin" else "blocks."
    assert changed
    assert all(name.startswith(f"{stage}0." if indices else stage) for name in changed)


@pytest.mark.parametrize("case", ["classic", "registers"])
def test_the_damage_of_every_width_is_measured_where_the_last_block_is_not_read(case: str):
    reader = Reader(backbone(case, depth=3), [-2])
    _, plan = toolchain.shrink(reader, pictures(*reader.body.patch_embed.img_size), params=0.9, at="body")
    assert plan.keeps
    assert not any(keep.module.startswith("blocks.2.") for keep in plan.keeps)


@pytest.mark.parametrize("case", [case for case in TURNED if case in STRUCTURES])
def test_a_grid_of_other_sides_and_as_many_patches_turns_queries_otherwise(case: str):
    """Once read as the square that the model was built for, of which a strip has as many patches."""
    changes = {} if case == "NaFlex rotary" else {"dynamic_img_size": True}
    model = backbone(case, **changes)
    step = 14 if case == "EVA-02 base" else 16
    images = pictures(step, 4 * step)
    small, _ = toolchain.shrink(model, images, params=1.0, compress=UNIFORM)
    torch.testing.assert_close(small(torch.cat(images)), model(torch.cat(images)), atol=1e-4, rtol=1e-4)


class Doubled(timm.models.VisionTransformer):
    """More happens between its blocks than they say."""

    def forward_features(self, x: Tensor, **_: object) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = 2 * block(x)
        return self.norm(x)


def test_a_model_that_does_more_than_its_blocks_say_is_refused():
    model = Doubled(img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, num_classes=7).eval()
    with pytest.raises(ModelError, match=r"Doubled does more than its blocks say.*differ by .* of the largest"):
        toolchain.shrink(model, pictures(32, 32), params=0.7, compress=UNIFORM)
