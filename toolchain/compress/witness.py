"""What a larger model does with a backbone in it: which images it gives it, and what it reads of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models import feature_take_indices
from torch import Tensor, nn

from toolchain.errors import DataError, ModelError

MOST = 1024
"""So many images are read of what may have no end."""
WAYS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")
"""The methods of timm's models by which images enter."""


@dataclass(frozen=True)
class Reading:
    """What is read of a backbone: its own output, its tokens after the last norm, or the stream after some blocks.

    Attributes:
        way: of `WAYS`.
        layers: numbers of the blocks, if intermediate layers are read.
        normed: whether the last norm is applied to these.
    """

    way: str
    layers: tuple[int, ...] = ()
    normed: bool = False


@dataclass
class Witness:
    """What was seen.

    Attributes:
        images: what entered the backbone, float32 [C, H, W] each.
        readings: the ways in which it was called.
    """

    images: list[Tensor] = field(default_factory=list)
    readings: set[Reading] = field(default_factory=set)


@torch.no_grad()
def witnessed(backbone: nn.Module, run: Callable[[Any], object], inputs: Iterable[Any]) -> Witness:
    """The images that enter a backbone while `run` is called on each of some inputs, and what is read of it.

    Args:
        backbone: a timm model; it is left as it is.
        run: the larger model, or a function that calls it.
        inputs: what `run` takes; reading ends after `MOST` images.

    Raises:
        ModelError: `run` does not call the backbone, or reads it in several ways.
        DataError: there are no inputs, or the images differ in size.
    """
    seen, count = Witness(), 0
    with _watched(backbone, seen):
        for each in inputs:
            run(each)
            count += 1
            if len(seen.images) >= MOST:
                break
    if not count:
        raise DataError("there are no images: give an iterable of tensors [C, H, W] or [B, C, H, W]")
    if not seen.images:
        raise ModelError("the larger model never calls what is to shrink: name another part with at")
    if len(seen.readings) > 1:
        ways = ", ".join(sorted({reading.way for reading in seen.readings}))
        raise ModelError(f"the larger model reads what is to shrink in several ways ({ways}); shrink takes one")
    if len(sizes := {tuple(image.shape) for image in seen.images}) > 1:
        some = " and ".join("×".join(map(str, size)) for size in sorted(sizes)[:2])
        raise DataError(f"images of several sizes enter what is to shrink, such as {some}: give images of one size")
    return seen


@contextmanager
def _watched(backbone: nn.Module, seen: Witness) -> Iterator[None]:
    """A block in which the outermost call of each of `WAYS` is noted."""
    depth = 0

    def watch(way: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                bound = inspect.signature(method).bind(*args, **kwargs)
                bound.apply_defaults()
                images = next(iter(bound.arguments.values()))
                seen.images += [*images.detach().float().cpu()][: MOST - len(seen.images)]
                seen.readings.add(_reading(backbone, way, bound.arguments))
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


def _reading(backbone: nn.Module, way: str, arguments: dict[str, Any]) -> Reading:
    wanted = arguments.get("indices" if way == "forward_intermediates" else "n")
    if way in WAYS[:2]:
        return Reading(way)
    taken, _ = feature_take_indices(len(backbone.get_submodule("blocks")), wanted)  # type: ignore[arg-type]
    return Reading("forward_intermediates", tuple(taken), bool(arguments["norm"]))
