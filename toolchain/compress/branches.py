"""One residual branch at a time: running it, watching it, and reducing it in closed form to any width.

Legend: B images, N tokens, D width, H heads, d head dim, M hidden neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from toolchain.compress.heads import Heads, HeadStatistics, exact_first_steps, rotate_query_key, rotate_value_output
from toolchain.compress.moments import Moments
from toolchain.compress.obs import eliminate, refit
from toolchain.data import batches, read
from toolchain.families import Branch, UnitGroup

BATCH = 32


@contextmanager
def captured(module: nn.Module, watched: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Module path → its last input ("in") or output ("out"), for the modules in `watched`."""
    seen: dict[str, Tensor] = {}

    def hook(name: str, side: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0] if side == "in" else output

        return keep

    handles = [module.get_submodule(name).register_forward_hook(hook(name, side)) for name, side in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Stop(Exception):
    """Ends a forward pass once the input of the first block is known."""


def first_residual(model: nn.Module, block: str, images: Dataset[tuple[Tensor, int]]) -> list[Tensor]:
    """The residual stream before a block, in batches [B, N, D]."""
    found: list[Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0])
        raise _Stop

    handle = model.get_submodule(block).register_forward_pre_hook(stop)
    try:
        for batch, _ in read(batches(images, BATCH)):
            try:
                model(batch)
            except _Stop:
                continue
    finally:
        handle.remove()
    return found


def run_branch(model: nn.Module, branch: Branch, x: Tensor) -> Tensor:
    """module(norm(x)), [B, N, D]: what the branch adds, before its scale."""
    y: Tensor = model.get_submodule(branch.module)(model.get_submodule(branch.norm)(x))
    return y


def advance(model: nn.Module, branch: Branch, x: Tensor) -> Tensor:
    """X + scale(module(norm(x))), [B, N, D]: the residual stream after the branch."""
    after: Tensor = x + model.get_submodule(branch.scale)(run_branch(model, branch, x))
    return after


class Reduction(Protocol):
    """A branch that was looked at once and can be cut to any width; the last cut counts."""

    reader: str
    """The linear that ends the branch: what reads the reduced positions."""

    def apply(self, width: int) -> Tensor:
        """The kept columns of the reader, ascending, after writing the weights of that width into the model."""
        ...

    def indices(self, width: int) -> tuple[int, ...]:
        """The positions that a plan keeps, per partition."""
        ...


class AttentionReduction:
    """Joint QK and VO: rotated once at full size, the least useful directions last; a width keeps the first ones."""

    def __init__(
        self, module: nn.Module, branch: Branch, group: UnitGroup, stream: Iterable[Tensor], rows: slice | None
    ) -> None:
        self.heads, self.group = Heads(module, group), group
        self.reader = self.heads.span("output").linear
        exact_first_steps(self.heads)
        found = self._statistics(branch, stream, rows)
        rotate_query_key(self.heads, found)
        _, self._shift = rotate_value_output(self.heads, found)
        self._rotated = {role: (self.heads.weight(role), self.heads.bias(role)) for role in ("query", "key", "value")}
        self._output = self.heads.weight("output")
        bias = self.heads.linear("output").bias
        self._bias = None if bias is None else bias.detach().double().clone()

    def indices(self, width: int) -> tuple[int, ...]:
        """The first `width` rotated directions."""
        return tuple(range(width))

    @torch.no_grad()
    def apply(self, width: int) -> Tensor:
        """Zeroes the directions from `width` on; the output bias takes up their mean."""
        first = (torch.arange(self.group.total) < width).double()  # [d]
        for role, (weight, bias) in self._rotated.items():
            self.heads.write(role, weight * first[:, None], None if bias is None else bias * first)
        self.heads.write("output", self._output * first)
        if self._bias is not None:
            self.heads.linear("output").bias.copy_(self._bias + self._shift[:, width:].sum((0, 1)))
        flags = torch.zeros(self.group.partitions, self.group.total, dtype=torch.bool)
        flags[:, :width] = True
        return flags.flatten().nonzero().squeeze(1) + self.heads.span("output").offset

    def _statistics(self, branch: Branch, stream: Iterable[Tensor], rows: slice | None) -> HeadStatistics:
        source, reader = self.heads.span("query").linear, self.reader
        query = key = total = square = torch.zeros((), dtype=torch.float64)
        images = tokens = 0
        with torch.no_grad(), captured(self.heads.module, {source: "out", reader: "in"}) as seen:
            for x in stream:
                run_branch(self.heads.module, branch, x)
                q, k = (self.heads.activations(role, seen[source]).double() for role in ("query", "key"))
                u = self.heads.activations("output", seen[reader]).double()
                if rows is not None:  # only what the head reads counts; keys are always of all tokens
                    q, u = q[:, :, rows], u[:, :, rows]
                k = k - k.mean(2, keepdim=True)
                query = query + torch.einsum("bhnd,bhne->hde", q, q)
                key = key + torch.einsum("bhnd,bhne->hde", k, k) / k.shape[2]
                total = total + u.sum((0, 2))
                square = square + torch.einsum("bhnd,bhne->hde", u, u)
                images, tokens = images + len(x), tokens + q.shape[0] * q.shape[2]
        mean = total / tokens
        covariance = square / tokens - mean[..., None] * mean[:, None]
        return HeadStatistics(query / tokens, key / images, mean, covariance)


class NeuronReduction:
    """OBS over the hidden neurons: eliminated once all the way down; a width keeps the last ones, re-fitted."""

    def __init__(
        self, module: nn.Module, branch: Branch, group: UnitGroup, stream: Iterable[Tensor], rows: slice | None
    ) -> None:
        span = next(span for span in group.spans if span.axis == 1)
        linear = module.get_submodule(span.linear)
        assert isinstance(linear, nn.Linear)
        self.reader, self._linear = span.linear, linear
        self._moments = Moments()
        with torch.no_grad(), captured(module, {span.linear: "in"}) as seen:
            for x in stream:
                run_branch(module, branch, x)
                h = seen[span.linear] if rows is None else seen[span.linear][:, rows]
                self._moments.add(h.flatten(0, -2))
        self._weight = linear.weight.detach().double().clone()
        self._bias = None if linear.bias is None else linear.bias.detach().double().clone()
        self._path = eliminate(self._weight, self._moments.covariance)

    def indices(self, width: int) -> tuple[int, ...]:
        """The neurons that are eliminated last."""
        return tuple(self._path.kept(width).tolist())

    @torch.no_grad()
    def apply(self, width: int) -> Tensor:
        """Lets the kept neurons predict the removed ones."""
        kept = self._path.kept(width)
        weight, shift = refit(self._weight, self._moments.covariance, self._moments.mean, kept)
        self._linear.weight.copy_(weight)
        if self._bias is not None:
            self._linear.bias.copy_(self._bias + shift)
        return kept


REDUCTIONS: Mapping[str, type[AttentionReduction | NeuronReduction]] = {
    "head_dim": AttentionReduction,
    "mlp_hidden": NeuronReduction,
}
