"""Closed-form reductions of a branch: each gathers statistics once, then cuts to any width.

A new reduction is one class and its registration in `REDUCTIONS`. Legend: B images, N tokens, D width, H heads, d head dim,
M hidden neurons, r rank; where a branch works in windows, B counts these and N the tokens of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from toolchain.compress.branches import captured, input_of
from toolchain.compress.choices import Site, key_of
from toolchain.compress.factorisations import principal_outputs
from toolchain.compress.heads import Heads, HeadStatistics, exact_first_steps, rotate_query_key, rotate_value_output
from toolchain.compress.moments import Moments
from toolchain.compress.obs import eliminate, predict_removed
from toolchain.compress.sensitivity import Sensitivity
from toolchain.cost import RANK
from toolchain.families import Branch, Factorizable, Span, UnitGroup
from toolchain.registry import Registry
from toolchain.surgery.factorised import FactorisedLinear, replace_module


def sites_in(branch: Branch, sites: Iterable[Site]) -> list[Site]:
    """The sites that lie in a branch, in order."""
    return [site for site in sites if branch.holds(key_of(site)[0])]


class Reduction(Protocol):
    """A site whose statistics were gathered, and that can be cut to any width; a new cut replaces the last one.

    Attributes:
        name: of the unit, or "rank": what is fewer afterwards.
    """

    name: ClassVar[str]

    def __init__(
        self, module: nn.Module, branch: Branch, site: Site, stream: Sequence[Tensor], care: Sensitivity
    ) -> None: ...

    def apply(self, width: int, *, refit: bool = True) -> None:
        """Writes the weights of that width into the model; with `refit` what is left takes over what it can."""
        ...

    def reader(self) -> tuple[str, Tensor] | None:
        """(the linear that ends the branch, its columns that are left) after the last cut; None if this is not it."""
        ...

    def indices(self, width: int) -> tuple[int, ...]:
        """The positions that a plan keeps, per partition; empty for a rank."""
        ...


class AttentionReduction:
    """Joint QK and VO: rotated once at full size, the least useful directions last; a width keeps the first ones."""

    name: ClassVar[str] = "head_dim"

    def __init__(
        self, module: nn.Module, branch: Branch, site: Site, stream: Sequence[Tensor], care: Sensitivity
    ) -> None:
        assert isinstance(site, UnitGroup)
        self.heads, self.group, self._width = Heads(module, site), site, site.total
        exact_first_steps(self.heads)
        statistics = self._statistics(branch, stream, care)
        rotate_query_key(self.heads, statistics)
        _, self._shift = rotate_value_output(self.heads, statistics, care.root, care.inverse_root)
        self._rotated = {role: (self.heads.weight(role), self.heads.bias(role)) for role in ("query", "key", "value")}
        self._output = self.heads.weight("output")
        bias = self.heads.linear("output").bias
        self._bias = None if bias is None else bias.detach().double().clone()

    def indices(self, width: int) -> tuple[int, ...]:
        """The first `width` rotated directions."""
        return tuple(range(width))

    @torch.no_grad()
    def apply(self, width: int, *, refit: bool = True) -> None:
        """Zeroes the directions from `width` on; with `refit` the output bias takes up their mean."""
        self._width = width
        first = (torch.arange(self.group.total) < width).double()  # [d]
        for role, (weight, bias) in self._rotated.items():
            self.heads.write(role, weight * first[:, None], None if bias is None else bias * first)
        self.heads.write("output", self._output * first)
        if self._bias is not None:
            shift = self._shift[:, width:].sum((0, 1)) if refit else 0.0
            self.heads.linear("output").bias.copy_(self._bias + shift)

    def reader(self) -> tuple[str, Tensor]:
        """The output projection and its columns without those of the removed directions, over all heads."""
        kept = torch.zeros(self.group.partitions, self.group.total, dtype=torch.bool)
        kept[:, : self._width] = True
        span = self.heads.span("output")
        return span.linear, _columns(self.heads.linear("output"), span, kept.flatten())

    @torch.no_grad()
    def _statistics(self, branch: Branch, stream: Sequence[Tensor], care: Sensitivity) -> HeadStatistics:
        source, reader = (
            {role: self.heads.span(role).linear for role in ("query", "key")},
            self.heads.span("output").linear,
        )
        query = key = total = square = torch.zeros((), dtype=torch.float64)
        windows, rows = 0, 0.0
        with captured(self.heads.module, dict.fromkeys(source.values(), "out")) as seen:
            for x in stream:
                mixed = input_of(self.heads.module, branch, reader, x)
                # In float64: what decides the order of directions is how little the least of them matter.
                q, k = (self.heads.activations(role, seen[name]).double() for role, name in source.items())
                u = self.heads.activations("output", mixed).double()
                weights = care.weights(self.heads.module, branch, x)[:, None, :, None]
                k = k - k.mean(2, keepdim=True)  # keys are always of all tokens
                key = key + _gram(k, k) / k.shape[2]
                query = query + _gram(q, q * weights)
                total = total + (u * weights).sum((0, 2))
                square = square + _gram(u, u * weights)
                windows, rows = windows + len(k), rows + len(x) * float(care.tokens.sum())
        mean = total / rows
        covariance = square / rows
        if self.heads.linear("output").bias is not None:  # else nothing can take up a mean
            covariance = covariance - mean[..., None] * mean[:, None]
        return HeadStatistics(query / rows, key / windows, mean, covariance)


class NeuronReduction:
    """OBS over the hidden neurons: eliminated once all the way down; a width keeps the last ones, re-fitted."""

    name: ClassVar[str] = "mlp_hidden"

    def __init__(
        self, module: nn.Module, branch: Branch, site: Site, stream: Sequence[Tensor], care: Sensitivity
    ) -> None:
        assert isinstance(site, UnitGroup)
        self._module, self._width = module, site.total
        self._span = next(span for span in site.spans if span.axis == 1)
        self._part = slice(self._span.offset, self._span.offset + site.total)
        moments = moments_of_input(module, branch, self._span.linear, stream, care)
        self._mean, self._covariance = moments.mean[self._part], moments.covariance[self._part, self._part]
        linear = _linear(module, self._span.linear)
        self._weight = linear.weight[:, self._part].detach().double().clone()
        self._bias = None if linear.bias is None else linear.bias.detach().double().clone()
        self._path = eliminate(care.root @ self._weight, self._covariance)
        self._rows = [(span, *self._row(span)) for span in site.spans if span.axis == 0]

    def _row(self, span: Span) -> tuple[Tensor, Tensor | None]:
        """(weight [M, in], bias [M] or None) that make the neurons, as they are."""
        linear, part = _linear(self._module, span.linear), slice(span.offset, span.offset + span.width)
        return linear.weight[part].detach().clone(), None if linear.bias is None else linear.bias[part].detach().clone()

    def indices(self, width: int) -> tuple[int, ...]:
        """The neurons that are eliminated last."""
        return tuple(self._path.kept(width).tolist())

    @torch.no_grad()
    def apply(self, width: int, *, refit: bool = True) -> None:
        """With `refit` lets the kept neurons predict the removed ones; without, these are only gone.

        What made the removed ones is gone too: no later site of the branch spends anything on it.
        """
        self._width, kept = width, self._path.kept(width)
        linear = _linear(self._module, self._span.linear)
        if refit:
            weight, shift = predict_removed(self._weight, self._covariance, self._mean, kept)
        else:
            weight, shift = torch.zeros_like(self._weight), torch.zeros(len(self._weight), dtype=torch.float64)
            weight[:, kept] = self._weight[:, kept]
        linear.weight[:, self._part] = weight.to(linear.weight)
        if self._bias is not None:
            linear.bias.copy_(self._bias + shift)
        alive = torch.zeros(self._span.width)
        alive[kept] = 1
        for span, row, bias in self._rows:
            maker, part = _linear(self._module, span.linear), slice(span.offset, span.offset + span.width)
            maker.weight[part] = row * alive[:, None].to(row)
            if bias is not None:
                maker.bias[part] = bias * alive.to(bias)

    def reader(self) -> tuple[str, Tensor]:
        """The second linear and its columns without those of the removed neurons."""
        kept = torch.zeros(self._span.width, dtype=torch.bool)
        kept[self._path.kept(self._width)] = True
        return self._span.linear, _columns(_linear(self._module, self._span.linear), self._span, kept)


class SplitReduction:
    """Data-aware low rank of one linear, the form that splits into two matmuls; full rank is the linear itself."""

    name: ClassVar[str] = RANK

    def __init__(
        self, module: nn.Module, branch: Branch, site: Site, stream: Sequence[Tensor], care: Sensitivity
    ) -> None:
        assert isinstance(site, Factorizable)
        self._module, self._name, self._ends = module, site.linear, site.ends_branch
        self._moments = moments_of_input(module, branch, site.linear, stream, care if self._ends else None)
        self._linear = _linear(module, site.linear)
        roots = (care.root, care.inverse_root) if self._ends else None
        self._up, self._down = principal_outputs(self._linear.weight, self._moments.covariance, roots)
        self._rank = min(self._linear.weight.shape)

    def indices(self, width: int) -> tuple[int, ...]:
        """Nothing: a rank is a number."""
        del width
        return ()

    @torch.no_grad()
    def apply(self, width: int, *, refit: bool = True) -> None:
        """Writes up = L^{-1}U_r and down = U_rᵀLW; with `refit` also b' = b + (W − up·down) μ."""
        self._rank, linear = width, self._linear
        if width >= min(linear.weight.shape):
            replace_module(self._module, self._name, linear)
            return
        pair, up, down = FactorisedLinear.like(linear, width), self._up[:, :width], self._down[:width]
        pair.up.weight.copy_(up)
        pair.down.weight.copy_(down)
        if linear.bias is not None:
            mean = self._moments.mean
            lost = linear.weight.double() @ mean - up @ (down @ mean) if refit else 0.0
            pair.up.bias.copy_(linear.bias.double() + lost)
        replace_module(self._module, self._name, pair)

    def reader(self) -> tuple[str, Tensor] | None:
        """`up` of the linear that ends the branch, all its columns."""
        if not self._ends:
            return None
        whole = self._rank >= min(self._linear.weight.shape)
        return (self._name if whole else f"{self._name}.up"), torch.arange(
            self._linear.in_features if whole else self._rank
        )


@torch.no_grad()
def moments_of_input(
    module: nn.Module, branch: Branch, linear: str, stream: Sequence[Tensor], care: Sensitivity | None
) -> Moments:
    """Moments of what enters a linear of a branch; without `care` every token counts the same, as keys and values do."""
    moments = Moments(centred=_linear(module, linear).bias is not None)
    for x in stream:
        entering = input_of(module, branch, linear, x)
        weights = None if care is None else care.weights(module, branch, x).flatten().to(entering)
        moments.add(entering.flatten(0, -2), weights=weights)
    return moments


def _columns(linear: nn.Linear, span: Span, kept: Tensor) -> Tensor:
    """Indices of a linear's columns, without those positions of a span at which `kept`, bool, is False."""
    flags = torch.ones(linear.in_features, dtype=torch.bool)
    flags[span.offset : span.offset + len(kept)] = kept
    return flags.nonzero().squeeze(1)


def _gram(x: Tensor, y: Tensor) -> Tensor:
    """Σ x yᵀ over images and tokens, [H, d, d], of two [B, H, N, d]."""
    return x.transpose(0, 1).flatten(1, 2).mT @ y.transpose(0, 1).flatten(1, 2)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


REDUCTIONS: Registry[type[Reduction]] = Registry(
    "reduction",
    "slimvit.reductions",
    {each.name: each for each in (AttentionReduction, NeuronReduction, SplitReduction)},
)
