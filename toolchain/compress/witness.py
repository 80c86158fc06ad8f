"""What a larger model does with a backbone in it: which images it gives it, and what it reads of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from toolchain.errors import DataError, ModelError

MOST = 1024
"""So many images are read of what may have no end."""
WAYS = ("forward", "forward_features", "forward_intermediates", "get_intermediate_layers")
"""The methods of timm's models by which images enter."""


@dataclass(frozen=True)
class Reading:
    """What is read of a backbone: its own output, its tokens after the last norm, or its intermediate features.

    Attributes:
        way: of `WAYS`; "get_intermediate_layers" is an older name of "forward_intermediates".
        features: which of timm's `feature_info`, if these are read.
        normed: whether the last norm is applied to them.
    """

    way: str
    features: tuple[int, ...] = ()
    normed: bool = True


@torch.no_grad()
def witnessed(backbone: nn.Module, run: Callable[[Any], object], inputs: Iterable[Any]) -> tuple[Tensor, Reading]:
    """(the images that enter a backbone while `run` is called on each of some inputs, what is read of it).

    Images are float32 [N, C, H, W], on the CPU.

    Args:
        backbone: a timm model; it is left as it is.
        run: the larger model, or a function that calls it.
        inputs: what `run` takes; reading ends after `MOST` images.

    Raises:
        ModelError: `run` does not call the backbone, or reads it in several ways.
        DataError: there are no inputs, or the images differ in size.
    """
    images, readings, count = list[Tensor](), set[Reading](), 0
    with _watched(backbone, images, readings):
        for each in inputs:
            run(each)
            count += 1
            if len(images) >= MOST:
                break
    if not count:
        raise DataError("there are no images: give an iterable of tensors [C, H, W] or [B, C, H, W]")
    if not images:
        raise ModelError("the larger model does not run what is to shrink: give forward, a function that does")
    if len(readings) > 1:
        ways = ", ".join(sorted({reading.way for reading in readings}))
        raise ModelError(
            f"the larger model reads what is to shrink in several ways ({ways}); give forward, with one of them"
        )
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        some = " and ".join("×".join(map(str, size)) for size in sorted(sizes)[:2])
        raise DataError(f"images of several sizes enter what is to shrink, such as {some}: give images of one size")
    return torch.stack(images), readings.pop()


@contextmanager
def _watched(backbone: nn.Module, images: list[Tensor], readings: set[Reading]) -> Iterator[None]:
    """A block in which the outermost call of each of `WAYS` adds its images and its reading."""
    depth = 0

    def watch(way: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth == 0:
                bound = inspect.signature(method).bind(*args, **kwargs)
                bound.apply_defaults()
                entering = next(iter(bound.arguments.values()))
                images.extend([*entering.detach().float().cpu()][: MOST - len(images)])
                readings.add(_reading(backbone, way, bound.arguments))
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


def _reading(backbone: nn.Module, way: str, arguments: Mapping[str, Any]) -> Reading:
    if way in WAYS[:2]:
        return Reading(way)
    wanted = arguments["indices" if way == WAYS[2] else "n"]
    count = len(backbone.feature_info)  # type: ignore[arg-type]
    taken, _ = feature_take_indices(count, list(wanted) if isinstance(wanted, tuple) else wanted)
    whole = {count - 1} if way == WAYS[2] and not arguments["intermediates_only"] else set()
    return Reading(WAYS[2], tuple(sorted({*taken, *whole})), bool(arguments["norm"]))
