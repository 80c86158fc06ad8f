"""Small models and plans that many tests share."""

from __future__ import annotations

import torch
from torch import nn

from toolchain.artifact import Preprocess, TimmModel
from toolchain.families import family_of
from toolchain.plan import CompressionPlan, Keep, LowRank, ModelRef
from toolchain.surgery.replay import create_dense

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}

VARIANTS: dict[str, dict[str, object]] = {
    "classic": {},
    "distilled": {"name": "deit_tiny_distilled_patch16_224"},
    "layer scale": {"name": "deit3_small_patch16_224"},
    "registers": {"name": "vit_small_patch14_reg4_dinov2", "img_size": 28, "patch_size": 14},
    "average pooling": {"name": "vit_medium_patch16_gap_256"},
    "packed SwiGLU": {"name": "vit_giant_patch14_dinov2", "img_size": 28, "patch_size": 14},
    "q/k norm": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "no proj bias": {"proj_bias": False},
}
"""Every form of the family, as changes of `TINY`."""


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every bias, norm and LayerScale values that matter, so that no comparison is vacuous."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("gamma", "ls1", "ls2")):
                parameter.copy_(0.5 + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * noise)
    return module


def dense_model(name: str = "vit_tiny_patch16_224", seed: int = 0, **kwargs: object) -> TimmModel:
    """A randomised dense model; without kwargs, two blocks of width 48."""
    ref = ModelRef(name=name, kwargs=dict(kwargs or TINY))
    torch.manual_seed(seed)
    module = randomise(create_dense(ref), seed)
    family = family_of(module, name)
    size = module.patch_embed.img_size
    shape = (module.in_chans, size[0], size[1])
    preprocess = Preprocess(shape, (0.5,) * shape[0], (0.5,) * shape[0])
    return TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {"weights": "random"})


def variant(case: str, seed: int = 0) -> TimmModel:
    """One of `VARIANTS` at the size of `TINY`."""
    kwargs = {**TINY, **VARIANTS[case]}
    return dense_model(str(kwargs.pop("name", "vit_tiny_patch16_224")), seed, **kwargs)


def random_plan(model: TimmModel, seed: int = 0, *, low_rank: bool = True, share: float = 0.5) -> CompressionPlan:
    """A plan that removes about 1 − share of every unit and factorises every attention linear."""
    generator = torch.Generator().manual_seed(seed)
    keeps = []
    for group in model.groups:
        count = max(1, round(group.total * (share if group.sliceable else 0.9)))
        parts = tuple(
            tuple(sorted(torch.randperm(group.total, generator=generator)[:count].tolist()))
            for _ in range(group.partitions)
        )
        keeps.append(Keep(module=group.module, unit=group.unit, total=group.total, indices=parts))
    lows = []
    if low_rank:
        for item in model.family.factorizable(model.module):
            if item.kind == "attention":
                out, into = model.module.get_submodule(item.linear).weight.shape
                lows.append(
                    LowRank(module=item.linear, shape=(out, into), rank=max(1, int(share * out * into / (out + into))))
                )
    return CompressionPlan(model=model.ref, keeps=tuple(keeps), low_ranks=tuple(lows), provenance={"seed": seed})
