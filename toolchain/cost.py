"""Parameters, multiply-accumulates and bytes of a model, from shapes alone; latency, from a table of measured shapes.

A model is traced once on the meta device (no weights, no arithmetic); after that the cost of any plan is a sum over
shapes. MACs are those of linears, convolutions, q kᵀ and (softmax) v for one image; norms, activations and additions
are not counted. Position-bias MLPs are constant-folded on export: their MACs are not counted, their parameters are. Latency is
measured elsewhere (`toolchain.pipeline.latency_budget`); this module only holds the measured table.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn

from toolchain.errors import ArtifactError
from toolchain.families import Family, UnitGroup
from toolchain.families.constants import constants
from toolchain.plan import BYTES_PER_PARAM, CompressionPlan
from toolchain.records import Record, first_fault

VARIED = 150
"""Extra bytes in a file's graph for each attention whose width differs from the others': shapes, and longer names."""
RANK = "rank"
"""The unit name of a factorised linear's rank, where ranks and kept positions are counted alike."""


def pair_pays(rank: int, out_features: int, in_features: int) -> bool:
    """Whether two matmuls of this rank have fewer parameters than the matmul that they replace."""
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
        if self.rank is not None and self.is_pair:
            return self.rank * (self.out_features + self.in_features)
        return self.out_features * self.in_features

    @property
    def outputs(self) -> int:
        """Columns of its weight: of a pair those of both matrices."""
        return self.out_features + (self.rank if self.rank is not None and self.is_pair else 0)

    @property
    def is_pair(self) -> bool:
        """Whether two matmuls take its place."""
        return self.rank is not None and pair_pays(self.rank, self.out_features, self.in_features)

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
    """The two products of attention: H heads of head dim d over N tokens in each of some windows.

    Attributes:
        queries: how many tokens ask; None for all N.
    """

    heads: int
    head_dim: int
    tokens: int
    windows: int = 1
    queries: int | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of q kᵀ and of the weighted sum of v for one image."""
        queries = self.tokens if self.queries is None else self.queries
        return 2 * self.windows * self.heads * queries * self.tokens * self.head_dim


@dataclass(frozen=True)
class Storage:
    """How the files of one precision store weights, in bytes.

    Attributes:
        weight: of a weight of a linear.
        output: of what comes with each output of such a linear: scales and zero points.
        bias: of a bias, with its own.
        other: of every parameter of another layer.
        pair: of what stands in the graph for the second matmul of a linear that is split.
        left: how linears are stored that keep a finer type; None where that is fp32.
    """

    weight: float = BYTES_PER_PARAM
    output: float = 0.0
    bias: float = BYTES_PER_PARAM
    other: float = BYTES_PER_PARAM
    pair: float = 200.0
    left: Storage | None = None

    def bytes_of(self, shape: ModelShape, whole: Collection[str] = ()) -> float:
        """The bytes of all weights of a model; some linears keep a finer type, and are counted as such.

        A linear that the graph has no name for is counted like the others: what its file has more is then taken for bytes that no
        width changes, and a smaller one has fewer than predicted.
        """
        known = {name: shape.linears[name] for name in whole if name in shape.linears}
        if known:
            finer = replace(shape, linears=known, other_params=0)
            rest = replace(shape, linears={name: each for name, each in shape.linears.items() if name not in known})
            return (self.left or Storage()).bytes_of(finer) + self.bytes_of(rest)
        linears = shape.linears.values()
        weights = sum(self.weight * each.weight_params + self.output * each.outputs for each in linears)
        biases = self.bias * sum(each.params - each.weight_params for each in linears)
        return weights + biases + self.pair * sum(each.is_pair for each in linears) + self.other * shape.other_params


@dataclass(frozen=True)
class FileCost:
    """The bytes of a file of one precision, for any widths.

    Attributes:
        precision: of the file.
        storage: how it stores weights.
        rest: bytes that no width changes, the graph above all: measured on the file of the dense model, None where that was not done.
        whole: linears that keep a finer type in that file.
        damage: what rounding does to the dense model's outputs: mean KL divergence per image, nats; None where it was not measured.
    """

    precision: str
    storage: Storage
    rest: float | None = None
    whole: tuple[str, ...] = ()
    damage: float | None = None

    @property
    def name(self) -> str:
        """Name of this cost in budgets."""
        return f"size.{self.precision}"

    def bytes_of(self, shape: ModelShape) -> float:
        """The bytes of the file of a model of some shape."""
        return (self.rest or 0.0) + self.storage.bytes_of(shape, self.whole)

    def measured(self, shape: ModelShape, size: int, whole: Collection[str], damage: float | None) -> FileCost:
        """The same once the file of the dense model, of some shape, is there."""
        own = VARIED * len(shape.attentions)
        rest = size - self.storage.bytes_of(shape, whole) + own
        return replace(self, rest=rest, whole=tuple(sorted(whole)), damage=damage)


@dataclass(frozen=True)
class Widths:
    """How many positions and ranks are kept, which is all that cost depends on; not which ones.

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
    """Every shape that cost depends on; `other_*` sums what no plan can change.

    `scale_params` of them are LayerScales, which every model that ships has folded away.
    """

    linears: Mapping[str, LinearShape]
    attentions: Mapping[str, AttentionShape]
    other_params: int
    other_macs: int
    scale_params: int = 0

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
        """The shape that ships, after slicing and splitting.

        Units that are not sliceable stay, pairs that do not pay are merged, LayerScales are gone.
        """
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
        others = self.other_params - self.scale_params
        return replace(self, linears=linears, attentions=attentions, other_params=others, scale_params=0)


def trace(module: nn.Module, family: Family, input_size: tuple[int, int, int]) -> ModelShape:
    """The shapes of a model, dense or compressed, for one image of [C, H, W] = `input_size`."""
    shadow = copy.deepcopy(module).to("meta").eval()
    linears: dict[str, LinearShape] = {}
    conv_macs = 0
    inside: dict[str, tuple[int, int]] = {}
    names = {m: name for name, m in shadow.named_modules()}
    sites = {site.module: site for site in family.attentions(module)}
    once = {part for constant in constants(shadow) for part in constant.part.modules()}

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
        windows, tokens, _width = inputs[0].shape
        inside[names[layer]] = (tokens, windows)

    for name, child in shadow.named_modules():
        if child in once:
            continue
        if isinstance(child, nn.Linear):
            child.register_forward_hook(on_linear)
        elif isinstance(child, nn.Conv2d):
            child.register_forward_hook(on_conv)
        elif name in sites:
            child.register_forward_hook(on_attention)
    with torch.no_grad():
        shadow(torch.empty(1, *input_size, device="meta"))
    attentions = {
        name: AttentionShape(site.heads, site.head_dim, *inside[name], queries=site.queries)
        for name, site in sites.items()
    }
    params = sum(p.numel() for p in module.parameters())
    scales = [branch.scale for branch in family.branches(module) if branch.scale is not None]
    scale_params = sum(module.get_parameter(name).numel() for name in scales)
    others = params - sum(linear.params for linear in linears.values())
    return ModelShape(linears, attentions, others, conv_macs, scale_params)


class SavedLatency(Record):
    """What narrowing one unit saves, measured once for all units of equal shapes.

    Attributes:
        members: (module, unit), or (linear, "rank"), of the equal units.
        points: (kept, share of the dense model's latency that ONE such unit then saves), kept ascending, the share never
            rising; the last point is where nothing is saved.
    """

    members: Annotated[tuple[tuple[str, str], ...], Field(min_length=1)]
    points: Annotated[tuple[tuple[int, float], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _monotone(self) -> SavedLatency:
        if any(a[0] >= b[0] or a[1] < b[1] for a, b in pairwise(self.points)) or self.points[-1][1] != 0:
            raise ValueError(f"a wider unit must not save more, and the widest saves nothing; got {self.points}")
        return self

    def at(self, kept: int) -> float:
        """The saved share at some width, linear between the points; beyond them the nearest point's."""
        widths, shares = [point[0] for point in self.points], [point[1] for point in self.points]
        return float(np.interp(kept, widths, shares))


class LatencyTable(Record):
    """The latency of any widths on one target: ratio to dense = 1 − correction · Σ over units of what each saves.

    Attributes:
        target, batch, threads: what was measured, as in [bench].
        dense_ms: of the dense model.
        saved: one curve for each class of equal units.
        correction: measured saving of a whole model over the sum of what its units save alone.
        environment: the machine, as `toolchain.on_device.runner.fingerprint` describes it.
    """

    schema_: Annotated[Literal["slimvit.latency/1"], Field(alias="schema")] = "slimvit.latency/1"
    target: str
    batch: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=1)]
    dense_ms: Annotated[float, Field(gt=0)]
    saved: tuple[SavedLatency, ...]
    correction: Annotated[float, Field(gt=0)] = 1.0
    environment: dict[str, Any] = Field(default_factory=dict)

    def ratio(self, widths: Widths) -> float:
        """Predicted time of some widths over the time of the dense model; units that were not measured save nothing."""
        return 1 - self.correction * self._sum(widths)

    def corrected(self, widths: Widths, measured: float) -> LatencyTable:
        """The same table, scaled so that it predicts what was measured for some widths; as it is if they save nothing.

        A model that was measured to save nothing leaves a twentieth of what its units save, so that the scale stays
        above 0.
        """
        total = self._sum(widths)
        return self if total <= 0 else self.model_copy(update={"correction": max(0.05, (1 - measured) / total)})

    def _sum(self, widths: Widths) -> float:
        counts = {**widths.kept, **{(name, RANK): rank for name, rank in widths.ranks.items()}}
        curves = {key: curve for curve in self.saved for key in curve.members}
        return sum(curves[key].at(count) for key, count in counts.items() if key in curves)

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    @staticmethod
    def from_json(text: str) -> LatencyTable:
        """The table written by `to_json`; raises ArtifactError for any other text."""
        try:
            return LatencyTable.model_validate_json(text)
        except ValidationError as error:
            raise ArtifactError(f"not a slimvit.latency/1 table: {first_fault(error, 'top level')}") from None
