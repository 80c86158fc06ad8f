"""Torch-Pruning on a timm ViT, as its own examples/transformers/prune_timm_vit.py does it, down to a parameter budget.

What is different from that example, and why it is no handicap, is in the README beside this file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from timm.layers import LayerScale
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional

from toolchain.cost import trace
from toolchain.data import DataSource, batches
from toolchain.errors import BudgetError, RecipeError
from toolchain.likelihood import likelihood_of
from toolchain.model import MaskedModel, TimmModel
from toolchain.plan import CompressionPlan

TOLERANCE = 0.01  # of the wanted parameters
EXACT = 1e-3  # good enough to stop searching
HALVINGS = 12
BATCH = 64
LOSSES = ("labels", "view", "score")


@dataclass(frozen=True)
class Settings:
    """The options of the example that matter here, under its names, and the budget.

    Attributes:
        params: share of the dense parameters that is left.
        bottleneck: prune only inside attention and MLP; else the residual stream too.
        global_pruning: rank dimensions over all layers; else every layer loses the same share.
        prune_num_heads: remove whole heads, `head_pruning_ratio` of them, and no dimension inside a head.
        head_pruning_ratio: only with `prune_num_heads`.
        round_to: widths are multiples of it; 1 for any.
        taylor_batches: batches of calibration images whose gradients are accumulated.
        batch: images in one of them.
        loss: whose gradients: "labels" is cross-entropy; of features, which no label trains, "view" is the squared distance
            of an image's from its mirror image's, in units of their spread, and "score" a random projection of them.
        scale: "dense" keeps the temperature of the softmax of the dense model, "sdpa" takes that of the smaller head.
    """

    params: float
    bottleneck: bool = True
    global_pruning: bool = False
    prune_num_heads: bool = False
    head_pruning_ratio: float = 0.0
    round_to: int = 1
    taylor_batches: int = 10
    batch: int = BATCH
    loss: str = "labels"
    scale: str = "dense"

    @staticmethod
    def of(raw: Mapping[str, Any]) -> Settings:
        """The settings of a cell; raises RecipeError for a name that there is none of."""
        try:
            settings = Settings(**raw)
        except TypeError as error:
            raise RecipeError(f"peer settings {sorted(raw)}: {error}") from None
        if settings.scale not in ("dense", "sdpa"):
            raise RecipeError(f"peer.scale is {settings.scale!r}, expected 'dense' or 'sdpa'")
        if settings.loss not in LOSSES:
            raise RecipeError(f"peer.loss is {settings.loss!r}, expected one of {', '.join(LOSSES)}")
        return settings


def peer_version() -> dict[str, str]:
    """What a peer's cell depends on besides this tool."""
    return {"torch-pruning": version("torch-pruning")}


def prune(
    model: TimmModel, source: DataSource, settings: Settings, gradients: Mapping[str, Tensor] | None = None
) -> tuple[MaskedModel, dict[str, Any]]:
    """(the pruned model, what was chosen): the pruning ratio is bisected until the parameters left are those wanted.

    The model is returned as one without a plan, so that the same recovery and evaluation take it as any other.
    `gradients` are those of `gradients_of`, where they are known already.

    Raises:
        BudgetError: no pruning ratio comes within 1 % of the wanted parameters.
    """
    dense = trace(model.module, model.family, model.preprocess.input_size).params
    wanted = settings.params * dense
    gradients = gradients_of(model, source, settings) if gradients is None else gradients
    best = nearest(lambda ratio: pruned(model, gradients, settings, ratio), wanted)
    if best.distance > EXACT * wanted:  # a head dim is a coarse step; the neurons make up for it
        fine = nearest(lambda ratio: pruned(model, gradients, settings, best.ratio, ratio), wanted)
        best = min(best, replace(fine, ratio=best.ratio, mlp_ratio=fine.ratio), key=lambda each: each.distance)
    if best.distance > TOLERANCE * wanted:
        raise BudgetError(
            f"Torch-Pruning reaches {best.params:,} parameters with {settings}, {wanted:,.0f} were wanted: more than "
            f"{TOLERANCE:.0%} away. Change round_to or head_pruning_ratio."
        )
    plan = CompressionPlan(model=model.ref, keeps=(), low_ranks=(), provenance={"method": "torch-pruning"})
    fields = (model.ref, best.module.eval(), model.family, model.groups, model.preprocess, model.provenance)
    facts = {"pruning_ratio": best.ratio, "mlp_pruning_ratio": best.mlp_ratio, **shapes(best.module)}
    return MaskedModel(*fields, plan=plan), facts


@dataclass(frozen=True)
class Attempt:
    """A pruned module, how far its parameters are from those wanted, and the ratios that gave it."""

    distance: float
    params: int
    ratio: float
    module: nn.Module
    mlp_ratio: float | None = None


def nearest(prune_at: Callable[[float], nn.Module], wanted: float) -> Attempt:
    """What comes nearest to the wanted parameters, by bisection of the ratio that is removed."""
    low, high, tries = 0.0, 1.0, []
    while len(tries) < HALVINGS and not (tries and tries[-1].distance <= EXACT * wanted):
        ratio = (low + high) / 2
        module = prune_at(ratio)
        params = sum(parameter.numel() for parameter in module.parameters())
        low, high = (ratio, high) if params > wanted else (low, ratio)
        tries.append(Attempt(abs(params - wanted), params, ratio, module))
    return min(tries, key=lambda each: each.distance)


def gradients_of(model: TimmModel, source: DataSource, settings: Settings) -> dict[str, Tensor]:
    """Parameter → the gradient of a loss, accumulated over batches of calibration images."""
    count, batch = settings.taylor_batches, settings.batch
    if settings.loss == "labels":
        return taylor_gradients(model.module, source, count, batch)
    generator = torch.Generator().manual_seed(0)
    likelihood = likelihood_of(model.output, model.module, source.split("calibration"))

    def loss(module: nn.Module, images: Tensor, _labels: Tensor) -> Tensor:
        if settings.loss == "score":
            return likelihood.score_loss(module(images), generator)
        with torch.no_grad():
            mirrored = module(images.flip(-1))
        return likelihood.divergence(module(images), mirrored).mean()

    return accumulated(model.module, source, count, batch, loss)


def taylor_gradients(module: nn.Module, source: DataSource, count: int, batch: int = BATCH) -> dict[str, Tensor]:
    """Parameter → ∂CE/∂w, accumulated over `count` batches of calibration images and their labels."""
    return accumulated(module, source, count, batch, lambda work, x, y: functional.cross_entropy(work(x), y))


def accumulated(
    module: nn.Module, source: DataSource, count: int, batch: int, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Parameter → ∂loss/∂w, summed over `count` batches (images, labels).

    Calibration images repeat from the start where there are too few of them.
    """
    work = copy.deepcopy(module).eval()
    images = source.split("calibration")
    positions = torch.arange(count * batch) % len(images)
    with torch.enable_grad():
        for drawn, labels in batches(images.take(positions), batch):
            loss(work, drawn, labels).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in work.named_parameters() if p.grad is not None}


def pruned(
    model: TimmModel,
    gradients: Mapping[str, Tensor],
    settings: Settings,
    ratio: float,
    mlp_ratio: float | None = None,
) -> nn.Module:
    """A copy of a module after one step of Torch-Pruning's `BasePruner` (its `MetaPruner`) at a pruning ratio.

    `mlp_ratio`, where given, is that of the hidden neurons.
    """
    import torch_pruning

    module = copy.deepcopy(model.module).eval().requires_grad_(True)
    for name, parameter in module.named_parameters():
        parameter.grad = gradients[name].clone()
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    mlps = [part for part in module.modules() if isinstance(part, Mlp)]
    hidden = tuple(part.fc1 for part in mlps)
    scales = [part.gamma for part in module.modules() if isinstance(part, LayerScale)]
    ignored = [module.get_submodule("head"), *(part.fc2 for part in mlps if settings.bottleneck)]
    pruner = torch_pruning.pruner.BasePruner(
        module,
        torch.zeros(1, *model.preprocess.input_size),
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=settings.global_pruning,
        pruning_ratio=ratio,
        pruning_ratio_dict=None if mlp_ratio is None else {hidden: mlp_ratio},
        ignored_layers=ignored,
        num_heads={part.qkv: part.num_heads for part in attentions},
        prune_num_heads=settings.prune_num_heads,
        prune_head_dims=not settings.prune_num_heads,
        head_pruning_ratio=settings.head_pruning_ratio,
        round_to=settings.round_to if settings.round_to > 1 else None,
        unwrapped_parameters=[(each, each.ndim - 1) for each in (*module.parameters(recurse=False), *scales)],  # tokens
        in_channel_groups={},  # its defaults are shared between calls, and it writes to them
        out_channel_groups={},
        channel_groups={},
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for part in attentions:
        fit_attention(part, pruner.num_heads[part.qkv], settings.scale)
    for parameter in module.parameters():
        parameter.grad = None
    return module


@torch.no_grad()
def fit_attention(part: Attention, heads: int, scale: str) -> None:
    """Sets timm's attributes to the shapes that pruning left, in place; fused attention reads them, and only them.

    timm's attention multiplies q kᵀ by r^-½ of its own head dim r where it is fused. The dense model's temperature d^-½
    is kept by multiplying the query rows by √(r/d).
    """
    before = part.head_dim
    part.num_heads, part.head_dim = heads, part.qkv.out_features // (3 * heads)
    part.attn_dim, part.scale = heads * part.head_dim, part.head_dim**-0.5
    if scale == "dense":
        queries = math.sqrt(part.head_dim / before)
        part.qkv.weight[: part.attn_dim] *= queries
        if part.qkv.bias is not None:
            part.qkv.bias[: part.attn_dim] *= queries


def shapes(module: nn.Module) -> dict[str, Any]:
    """What is left of every block: heads, head dim, hidden width; and the width of the residual stream."""
    blocks = [part for part in module.modules() if hasattr(part, "attn") and hasattr(part, "mlp")]
    return {
        "blocks": [
            {"heads": b.attn.num_heads, "head_dim": b.attn.head_dim, "mlp_hidden": b.mlp.fc1.out_features}
            for b in blocks
        ],
        "width": blocks[0].attn.qkv.in_features,
    }
