"""What `slimvit models` says: of every timm name something, quickly, and of none more than the model allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
from sweeps import swept
from torch import nn

from toolchain.families import FAMILIES, family_of
from toolchain.families.vit import VitFamily
from toolchain.plan import ModelRef
from toolchain.surgery.replay import create_dense
from toolchain.surgery.shapes import shapes_only
from toolchain.surgery.support import Support, support_of, supports, timm_names


def shapes_of(module):
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


def test_shapes_alone_are_those_of_the_model():
    """Nothing that decides a shape is left out with the initialisation."""
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_rope_224", "swin_tiny_patch4_window7_224"):
        with shapes_only():
            shapes = create_dense(ModelRef(name=name))
        assert all(parameter.is_meta for parameter in shapes.parameters())
        assert shapes_of(shapes) == shapes_of(create_dense(ModelRef(name=name)))


def test_what_has_values_is_filled_as_ever():
    with shapes_only():
        real = torch.empty(3, device="cpu").fill_(2)
        nn.init.ones_(shadow := torch.empty(3))
    assert real.tolist() == [2, 2, 2]
    assert shadow.is_meta
    assert shadow.shape == (3,)


def test_what_stays_as_it_is_is_said_of_a_full_model():
    rotary = support_of("vit_small_patch16_rope_224")
    assert rotary.support == "full"
    assert "attention can shrink by low rank" in rotary.reason
    assert rotary.params == sum(p.numel() for p in timm.create_model(rotary.name).parameters())


class _Without(VitFamily):
    """One block lacks a unit, and nothing is said of it."""

    def __init__(self, unit: str) -> None:
        self.name, self._lost = f"without {unit}", ("blocks.3", unit)

    def unit_groups(self, model):
        return [group for group in super().unit_groups(model) if (group.module[:8], group.unit) != self._lost]


def test_what_cannot_shrink_in_some_block_is_partial(register):
    register(FAMILIES, _Without("head_dim"))
    assert support_of("vit_tiny_patch16_224").support == "full", "attention still shrinks by low rank"
    register(FAMILIES, _Without("mlp_hidden"))
    row = support_of("vit_tiny_patch16_224")
    assert (row.support, row.reason) == ("partial", "feed-forward neurons cannot shrink in 1 of 12 blocks")


def test_what_timm_cannot_build_is_refused_in_its_words(monkeypatch):
    def fails(**_: object) -> nn.Module:
        raise ValueError("these widths do not fit")

    fails.__module__ = "timm.models.vision_transformer"
    monkeypatch.setitem(timm.models._registry._model_entrypoints, "vit_that_fails", fails)
    assert support_of("vit_that_fails") == Support(
        "vit_that_fails", "vision_transformer", "refused", "these widths do not fit"
    )


@pytest.mark.slow
@pytest.mark.parametrize("step", swept([1, 8], [8]))
def test_every_name_has_an_answer(step):
    assert timm_names() == timm.list_models()
    names = timm_names()[::step]
    rows = supports(names)
    assert [row.name for row in rows] == names
    claimed = {module for family in FAMILIES.values() for module in family.timm_modules}
    for row in rows:
        assert (row.params is None) == (row.module not in claimed), row
        assert row.reason or row.support == "full", row
    assert {row.support for row in rows} == {"full", "partial", "refused"}


NAMED = {
    "ViT": "vit_tiny_patch16_224",
    "DeiT": "deit_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv3": "vit_small_patch16_dinov3",
    "CLIP": "vit_base_patch32_clip_224",
    "SigLIP": "vit_base_patch16_siglip_224",
    "Perception Encoder": "vit_pe_core_base_patch16_224",
    "EVA": "eva_giant_patch14_224",
    "EVA-02": "eva02_base_patch14_224",
    "BEiT": "beit_base_patch16_224",
    "RoPE-ViT": "vit_small_patch16_rope_224",
    "relative-position ViT": "vit_relpos_base_patch16_224",
    "NaFlexViT": "naflexvit_base_patch16_gap",
    "hybrids": "vit_tiny_r_s16_p8_224",
    "Swin": "swin_tiny_patch4_window7_224",
    "Swin V2": "swinv2_tiny_window8_256",
}
"""What the README calls models → one of them."""


def test_the_readme_names_what_is_supported():
    """Each model that it names is supported, and it names one of every family."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| models \| timm's (.*?);", readme, re.MULTILINE)
    assert re.split(", | and ", row) == list(NAMED)
    assert {support_of(name).support for name in NAMED.values()} <= {"full", "partial"}
    with shapes_only():
        models = [(create_dense(ModelRef(name=name)), name) for name in NAMED.values()]
    named = {family_of(model, name).name for model, name in models}
    assert named == {family.name for family in FAMILIES.values()}
