"""Parameters, multiply-accumulates and bytes of a model, from shapes alone.

A model is traced once on the meta device (no weights, no arithmetic); after that the cost of any plan is a sum over
shapes. MACs are those of linears, convolutions, q kᵀ and (softmax) v for one image; norms, activations and additions
are not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from toolchain.families import Family, UnitGroup
from toolchain.plan import CompressionPlan

BYTES_PER_PARAM = 4  # fp32, the precision in which models are stored


def pair_pays(rank: int, out_features: int, in_features: int) -> bool:
    """Whether two matmuls of this rank hold fewer parameters than the one matmul that they replace."""
    return rank * (out_features + in_features) < out_features * in_features


@dataclass(frozen=True)
class LinearShape:
    """One linear: weight [out, in], applied to `rows` tokens per image; `rank` if it is factorised."""

    out_features: int
    in_features: int
    bias: bool
    rows: int
    rank: int | None = None

    @property
    def weight_params(self) -> int:
        """Parameters of the weight: r·(in+out) as a pair where that is fewer, else in·out."""
        if self.rank is not None and pair_pays(self.rank, self.out_features, self.in_features):
            return self.rank * (self.out_features + self.in_features)
        return self.out_features * self.in_features

    @property
    def params(self) -> int:
        """Parameters of the weight and the bias."""
        return self.weight_params + (self.out_features if self.bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.rows * self.weight_params


@dataclass(frozen=True)
class AttentionShape:
    """The two products of attention: H heads of head dim d over N tokens, 2·H·N²·d MACs."""

    heads: int
    head_dim: int
    tokens: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of q kᵀ and of the weighted sum of v for one image."""
        return 2 * self.heads * self.tokens**2 * self.head_dim


@dataclass(frozen=True)
class Widths:
    """How much is kept, without saying which: what cost depends on.

    Attributes:
        kept: (module, unit) → positions kept per partition.
        ranks: linear → rank.
    """

    kept: Mapping[tuple[str, str], int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of(plan: CompressionPlan) -> Widths:
        """The widths of a plan."""
        return Widths(
            {(k.module, k.unit): k.kept for k in plan.keeps}, {low.module: low.rank for low in plan.low_ranks}
        )


@dataclass(frozen=True)
class ModelShape:
    """Every shape that cost depends on; `other_*` is all that no plan can change."""

    linears: Mapping[str, LinearShape]
    attentions: Mapping[str, AttentionShape]
    other_params: int
    other_macs: int

    @property
    def params(self) -> int:
        """Parameters that are physically there."""
        return self.other_params + sum(linear.params for linear in self.linears.values())

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        linears = sum(linear.macs for linear in self.linears.values())
        return self.other_macs + linears + sum(site.macs for site in self.attentions.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights in fp32, without the few kilobytes of a file's structure."""
        return self.params * BYTES_PER_PARAM

    def shrunk(self, widths: Widths, groups: Iterable[UnitGroup]) -> ModelShape:
        """The shape after slicing and splitting: units that are not sliceable stay, pairs that do not pay are merged."""
        linears, attentions = dict(self.linears), dict(self.attentions)
        for name, rank in widths.ranks.items():
            linears[name] = replace(linears[name], rank=rank)
        for group in groups:
            kept = widths.kept.get((group.module, group.unit), group.total)
            if not group.sliceable or kept == group.total:
                continue
            for span in group.spans:
                gone = group.partitions * (group.total - kept)
                axis = "out_features" if span.axis == 0 else "in_features"
                shape = linears[span.linear]
                linears[span.linear] = replace(shape, **{axis: getattr(shape, axis) - gone})
            if "head_dim" in group.attrs:
                attentions[group.module] = replace(attentions[group.module], head_dim=kept)
        return replace(self, linears=linears, attentions=attentions)


def trace(module: nn.Module, family: Family, input_size: tuple[int, int, int]) -> ModelShape:
    """The shapes of a model, dense or compressed, for one image of [C, H, W] = `input_size`."""
    shadow = copy.deepcopy(module).to("meta").eval()
    linears: dict[str, LinearShape] = {}
    conv_macs = 0
    tokens: dict[str, int] = {}
    names = {m: name for name, m in shadow.named_modules()}
    sites = {site.module: site for site in family.attentions(module)}

    def on_linear(layer: nn.Module, _: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        rows = out.numel() // layer.out_features
        known = linears.get(names[layer])
        bias = layer.bias is not None
        shape = LinearShape(layer.out_features, layer.in_features, bias, rows + (known.rows if known else 0))
        linears[names[layer]] = shape

    def on_conv(layer: nn.Module, _: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        nonlocal conv_macs
        assert isinstance(layer, nn.Conv2d)
        conv_macs += out.numel() * layer.weight[0].numel()

    def on_attention(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        tokens[names[layer]] = inputs[0].shape[1]

    for name, child in shadow.named_modules():
        if isinstance(child, nn.Linear):
            child.register_forward_hook(on_linear)
        elif isinstance(child, nn.Conv2d):
            child.register_forward_hook(on_conv)
        elif name in sites:
            child.register_forward_hook(on_attention)
    with torch.no_grad():
        shadow(torch.empty(1, *input_size, device="meta"))
    attentions = {name: AttentionShape(site.heads, site.head_dim, tokens[name]) for name, site in sites.items()}
    params = sum(p.numel() for p in module.parameters())
    return ModelShape(linears, attentions, params - sum(linear.params for linear in linears.values()), conv_macs)
