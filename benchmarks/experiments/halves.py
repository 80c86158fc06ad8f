"""Attention whose parts shrink apart: queries and keys, values and output, each head by itself, or heads as a whole.

The weights stay in timm's module and what is gone is zeroed, which is the function that a module without it would compute: a
zeroed dim of q and k adds nothing to a logit, a zeroed dim of v nothing to the output.

Legend: H heads, d head dim, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from toolchain.compress.choices import Site
from toolchain.compress.heads import Heads, exact_first_steps, rotate_query_key, rotate_value_output
from toolchain.compress.reductions import REDUCTIONS, AttentionReduction
from toolchain.compress.sensitivity import Sensitivity
from toolchain.families import Branch, UnitGroup

LOGITS, VALUES = ("query", "key"), ("value", "output")


@dataclass(frozen=True)
class Part(UnitGroup):
    """A part of an attention as a unit of its own; `whole` is the "head_dim" that it is of."""

    whole: UnitGroup | None = None


def part_of(whole: UnitGroup, unit: str, roles: Sequence[str], *, apart: bool) -> Part:
    """The spans of some roles of a "head_dim", as many dims in each head, or with `apart` any [H·d] of all heads."""
    heads = whole.partitions if apart else 1
    spans = [span for span in whole.spans if span.role in roles]
    if apart:
        spans = [type(span)(span.linear, span.axis, span.offset, heads * span.width, span.role) for span in spans]
    partitions = 1 if apart else whole.partitions
    return Part(whole.module, unit, heads * whole.total, tuple(spans), partitions, whole=whole)


class PartReduction(AttentionReduction):
    """Rotates one part of an attention as `joint` does, and keeps the dims that matter most.

    Attributes:
        roles: what shrinks.
        apart: whether each head keeps as many dims as it needs.
        by_heads: whether a head stays or goes as a whole.
    """

    name: ClassVar[str] = "part"
    roles: ClassVar[tuple[str, ...]] = ()
    apart: ClassVar[bool] = False
    by_heads: ClassVar[bool] = False

    def __init__(
        self, module: nn.Module, branch: Branch, site: Site, stream: Sequence[Tensor], care: Sensitivity
    ) -> None:
        assert isinstance(site, Part)
        assert site.whole is not None
        self.heads, self.group, self._width = Heads(module, site.whole), site.whole, site.total
        exact_first_steps(self.heads)
        statistics = self._statistics(branch, stream, care)
        self._rotated, self._shift = {}, torch.zeros(())
        if "value" in self.roles:
            worth, self._shift = rotate_value_output(self.heads, statistics, care.root, care.inverse_root)
            self._output = self.heads.weight("output")
            bias = self.heads.linear("output").bias
            self._bias = None if bias is None else bias.detach().double().clone()
        if "query" in self.roles:
            logits = rotate_query_key(self.heads, statistics)
            if "value" not in self.roles:
                worth = logits * self._reach(statistics.covariance, care)[:, None]
        self._rotated = {
            role: (self.heads.weight(role), self.heads.bias(role)) for role in self.roles if role != "output"
        }
        if self.by_heads:
            worth = worth.sum(1, keepdim=True).expand_as(worth)
        self._order = worth.flatten().argsort(descending=True, stable=True)

    def indices(self, width: int) -> tuple[int, ...]:
        """The dims that stay, of all heads where these differ."""
        return tuple(sorted(self._order[:width].tolist())) if self.apart else tuple(range(width))

    @torch.no_grad()
    def apply(self, width: int, *, refit: bool = True) -> None:
        """Zeroes the dims that are gone; with `refit` the output bias takes up the mean of values'."""
        self._width, kept = width, self._kept(width)
        for role, (weight, bias) in self._rotated.items():
            self.heads.write(role, weight * kept[..., None], None if bias is None else bias * kept)
        if "value" not in self.roles:
            return
        self.heads.write("output", self._output * kept[:, None])
        if self._bias is not None:
            shift = (self._shift * (1 - kept)[..., None]).sum((0, 1)) if refit else 0.0
            self.heads.linear("output").bias.copy_(self._bias + shift)

    def reader(self) -> tuple[str, Tensor] | None:  # type: ignore[override]
        """The output projection and its columns that are left; None where only queries and keys shrink."""
        if "output" not in self.roles:
            return None
        span = self.heads.span("output")
        flags = torch.ones(self.heads.linear("output").in_features, dtype=torch.bool)
        kept = self._kept(self._width).flatten().bool()
        flags[span.offset : span.offset + len(kept)] = kept
        return span.linear, flags.nonzero().squeeze(1)

    def _kept(self, width: int) -> Tensor:
        """Which dims stay, float64 [H, d] of 0 and 1."""
        shape = (self.group.partitions, self.group.total)
        if not self.apart:
            return (torch.arange(shape[1]) < width).double().expand(shape)
        flags = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
        flags[self._order[:width]] = 1
        return flags.reshape(shape)

    def _reach(self, covariance: Tensor, care: Sensitivity) -> Tensor:
        """How much of what the output cares about a head adds, [H]: an error of its logits matters as much."""
        output = care.root @ self.heads.weight("output")
        return torch.einsum("hcd,hde,hce->h", output, covariance, output)


class QueryKey(PartReduction):
    """Queries and keys, as many dims in each head."""

    name: ClassVar[str] = "query_key"
    roles: ClassVar[tuple[str, ...]] = LOGITS


class ValueOutput(PartReduction):
    """Values and the output's columns, as many dims in each head."""

    name: ClassVar[str] = "value_output"
    roles: ClassVar[tuple[str, ...]] = VALUES


class QueryKeyByHead(QueryKey):
    """Queries and keys, each head as many dims as its logits need."""

    name: ClassVar[str] = "query_key_by_head"
    apart: ClassVar[bool] = True


class ValueOutputByHead(ValueOutput):
    """Values and the output's columns, each head as many dims as it needs; none at all is a head that is gone."""

    name: ClassVar[str] = "value_output_by_head"
    apart: ClassVar[bool] = True


class WholeHeads(PartReduction):
    """Heads as a whole; those that stay keep all their dims."""

    name: ClassVar[str] = "whole_heads"
    roles: ClassVar[tuple[str, ...]] = LOGITS + VALUES
    apart: ClassVar[bool] = True
    by_heads: ClassVar[bool] = True


PARTS: tuple[type[PartReduction], ...] = (QueryKey, ValueOutput, QueryKeyByHead, ValueOutputByHead, WholeHeads)
FORMS: dict[str, tuple[str, ...]] = {
    "tied": ("head_dim",),
    "two ranks": (QueryKey.name, ValueOutput.name),
    "by head": (QueryKeyByHead.name, ValueOutputByHead.name),
    "values by head": (QueryKey.name, ValueOutputByHead.name),
    "whole heads": (WholeHeads.name,),
}
"""Way to shrink an attention → its units; the first is today's."""


def parts_of(whole: UnitGroup) -> list[Part]:
    """Every part of one attention's "head_dim" that can shrink."""
    return [part_of(whole, each.name, each.roles, apart=each.apart) for each in PARTS]


def register() -> None:
    """Lets the closed form cut parts, in this process."""
    for each in PARTS:
        REDUCTIONS.add(each)
