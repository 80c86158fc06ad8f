"""Observes how a larger model uses its backbone: which images it passes in, and which outputs it reads."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from toolchain.errors import DataError, ModelError

log = logging.getLogger(__name__)

MOST, MOST_BYTES = 1024, 2**31
"""Most images, and most bytes of images, that are read from an iterable that may be endless."""
LARGE = 20.0
"""Values above this are not normalised: no usual mean and std give them for pixels in 0…1."""
WAYS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")
"""The methods of timm's models by which images enter."""
READ = (
    "indices",
    "n",
    "norm",
    "intermediates_only",
    "output_fmt",
    "output_dict",
    "stop_early",
    "reshape",
    "return_prefix_tokens",
)
"""Arguments of these methods that choose what is read, or its form."""


@dataclass(frozen=True)
class Readout:
    """What is read of a backbone: its own output, its tokens after the last norm, or its intermediate features.

    Attributes:
        way: of `WAYS`; "get_intermediate_layers" is an older name of "forward_intermediates".
        parts: paths of the blocks or stages after which these are read.
        normed: whether the last norm is applied to them.
    """

    way: str
    parts: tuple[str, ...] = ()
    normed: bool = True


@torch.no_grad()
def witnessed(backbone: nn.Module, run: Callable[[Any], object], inputs: Iterable[Any]) -> tuple[Tensor, Readout]:
    """(the images that enter a backbone while `run` is called on each of some inputs, what is read of it).

    Images are float32 [N, C, H, W], on the CPU.

    Args:
        backbone: a timm model; it is left as it is.
        run: the larger model, or a function that calls it.
        inputs: what `run` takes; reading ends after `MOST` images, or `MOST_BYTES`.

    Raises:
        ModelError: `run` does not call the backbone, or reads it in several ways.
        DataError: there are no inputs, or the images differ in size.
    """
    seen, empty = _Seen(), True
    with _watched(backbone, seen):
        for each in inputs:
            run(each)
            empty = False
            if not seen.images:
                raise ModelError(
                    "the larger model does not run what is to shrink: give forward, a function that does. What was bound "
                    "before is not seen: lambda x: body.forward_features(x), not body.forward_features"
                )
            if seen.is_full:
                break
    if empty:
        raise DataError("there are no images: give an iterable of tensors [C, H, W] or [B, C, H, W]")
    if len(seen.readouts) > 1:
        ways = ", ".join(sorted({readout.way for readout in seen.readouts}))
        raise ModelError(
            f"the larger model reads what is to shrink in several ways ({ways}); give forward, with one of them"
        )
    if len(sizes := {tuple(batch.shape[1:]) for batch in seen.images}) > 1:
        some = " and ".join("×".join(map(str, size)) for size in sorted(sizes)[:2])
        raise DataError(f"images of several sizes enter what is to shrink, such as {some}: give images of one size")
    return torch.cat(seen.images)[:MOST], seen.readouts.pop()


@dataclass
class _Seen:
    """Batches that entered a backbone, and the ways in which it was read."""

    images: list[Tensor] = field(default_factory=list)
    readouts: set[Readout] = field(default_factory=set)

    def add(self, entering: object, readout: Readout) -> None:
        if not (isinstance(entering, Tensor) and entering.ndim == 4):
            raise ModelError(f"what is to shrink is given a {type(entering).__name__}; it must be images [B, C, H, W]")
        if not entering.is_floating_point():
            raise DataError(f"the images are {entering.dtype}; give them as the model takes them, normalised floats")
        if not self.images and float(entering.abs().max()) > LARGE:
            log.warning(
                "The images reach %.0f, which is far for normalised ones; are they still pixels in 0…255?",
                float(entering.abs().max()),
            )
        elif not self.images and float(entering.min()) >= 0 and float(entering.max()) <= 1:
            log.warning("The images lie in 0…1; were they normalised by the model's mean and standard deviation?")
        self.readouts.add(readout)
        if not self.is_full:
            self.images.append(entering.detach().float().cpu())

    @property
    def is_full(self) -> bool:
        """Whether enough was seen: `MOST` images, or as many as `MOST_BYTES` hold."""
        return sum(map(len, self.images)) >= MOST or sum(batch.nbytes for batch in self.images) >= MOST_BYTES


@contextmanager
def _watched(backbone: nn.Module, seen: _Seen) -> Iterator[None]:
    """A block in which the outermost call of each of `WAYS` adds its images and its readout."""
    depth = 0

    def watch(way: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                bound = inspect.signature(method).bind(*args, **kwargs)
                bound.apply_defaults()
                seen.add(next(iter(bound.arguments.values())), _readout(backbone, way, bound))
            depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                depth -= 1

        return call

    ways = [way for way in WAYS if hasattr(backbone, way)]
    for way in ways:  # an attribute of the instance comes before the method of its class
        object.__setattr__(backbone, way, watch(way, getattr(backbone, way)))
    try:
        yield
    finally:
        for way in ways:
            object.__delattr__(backbone, way)


def _readout(backbone: nn.Module, way: str, bound: inspect.BoundArguments) -> Readout:
    arguments, parameters = bound.arguments, [*bound.signature.parameters.values()]
    for parameter in parameters[1:]:
        value = arguments[parameter.name]
        absent = value is parameter.default or (isinstance(value, tuple | dict) and not value)  # no *args, no **kwargs
        if not absent and parameter.name not in READ:
            raise ModelError(
                f"the larger model passes {parameter.name} to what is to shrink, which compression does not know of: give "
                "forward, a function that runs it without"
            )
    if way in WAYS[:2]:
        return Readout(way)
    wanted = arguments["indices" if way == WAYS[2] else "n"]
    parts = "blocks" if hasattr(backbone, "blocks") else "layers"
    count = len(getattr(backbone, parts))
    taken, _ = feature_take_indices(count, list(wanted) if isinstance(wanted, tuple) else wanted)
    whole = {count - 1} if way == WAYS[2] and not arguments["intermediates_only"] else set()
    return Readout(WAYS[2], tuple(f"{parts}.{index}" for index in sorted({*taken, *whole})), bool(arguments["norm"]))
