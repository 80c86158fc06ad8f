"""A model that is in memory made smaller: the compress stage without a recipe, a folder or a data source."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from toolchain.compress.method import UNITS
from toolchain.compress.place import Place
from toolchain.compress.problem import Problem
from toolchain.compress.stage import Compress
from toolchain.compress.witness import Reading, witnessed
from toolchain.data.tensors import tensor_source
from toolchain.errors import BudgetError, DataError, ModelError
from toolchain.families import Family, adapt, family_of
from toolchain.model import Preprocess, TimmModel, run_stage
from toolchain.outputs import Output
from toolchain.plan import CompressionPlan, ModelRef
from toolchain.progress import SILENT, Progress
from toolchain.recipe import ALIGN, BudgetSection, CompressSection
from toolchain.settings import share_of
from toolchain.surgery.layers import as_layered
from toolchain.surgery.replay import first_line
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.evaluate import judged

JOINT = CompressSection()
Images = Iterable[Any]
"""Tensors [C, H, W] or [B, C, H, W], pairs that begin with one, or whatever else `forward` takes."""


class Shrunk(NamedTuple):
    """A smaller model.

    Attributes:
        model: where `at` named a part of a larger model, that larger model itself, with the smaller part in it.
        plan: what was kept.
    """

    model: nn.Module
    plan: CompressionPlan


def shrink(
    model: nn.Module,
    images: Images,
    params: float = 0.5,
    *,
    at: str = "",
    forward: Callable[[Any], object] | None = None,
    compress: CompressSection = JOINT,
    progress: Progress = SILENT,
) -> Shrunk:
    """A smaller model that gives nearly the same outputs, and its plan; nothing is trained, and no label is read.

    The weights are solved for on the images, as by `method = "joint"` of a recipe. What the outputs are is seen from the
    way in which a larger model reads its part: the output of a call, the tokens of `forward_features`, or the layers of
    `forward_intermediates`.

    Args:
        model: a timm model of a supported family, or a larger one with such a model in it.
        images: as the model takes them, already normalised; each a tensor [C, H, W] or a batch [B, C, H, W], alone or first
            in a tuple, as a DataLoader gives them. The first 1024 are read. With `forward`, whatever that takes.
        params: the share of the parameters of what shrinks that is left.
        at: path of the part that shrinks, such as "backbone.body"; it is replaced in `model`. "" is the model itself, which
            is left as it is.
        forward: what runs the larger model on one element of `images`; it must reach the part. If absent, `model` is called.
        compress: how, as in [compress] of a recipe.
        progress: told how far it is.

    Raises:
        ModelError: what shrinks is of no supported family, the larger model does not reach it, or it cannot be replaced.
        DataError: there are too few images, or they differ in size.
        BudgetError: so few parameters are out of reach; the message names the range.
    """
    budget = _budget(params)
    place = Place.of(model, at)
    with judged(model):
        run = forward or partial(_run, model)
        entering, reading = witnessed(place.part, run, images if forward else _batches(images, model))
    source, dense = tensor_source(entering), _dense(place.part, at, entering[:1], reading)
    problem = Problem.of(dense, compress, budget, dict.fromkeys(UNITS, compress.align or ALIGN))
    masked = run_stage(Compress(source, progress=progress), problem).artifact
    smaller = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    return Shrunk(place.fill(smaller.module), smaller.plan)


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        size = "×".join(map(str, images.shape))
        raise ModelError(
            f"the model cannot run on your images, a batch of {size}: {first_line(error).rstrip('.')}. Give images [B, C, H, W] of the "
            "size and channels that it was built for"
        ) from error


def _budget(params: float) -> BudgetSection:
    try:
        return BudgetSection(params=share_of(params))
    except ValueError as error:
        raise BudgetError(f"params {error}") from None


def _batches(images: Images, model: nn.Module) -> Iterator[Tensor]:
    """[B, C, H, W] of each element, where the model computes."""
    first = next(model.parameters(), torch.zeros(()))
    for each in images:
        image = each[0] if isinstance(each, list | tuple) else each
        if not isinstance(image, Tensor) or image.ndim not in (3, 4):
            raise ModelError(
                f"images are tensors [C, H, W] or [B, C, H, W], got {type(image).__name__}"
                + (f" of {tuple(image.shape)}" if isinstance(image, Tensor) else "")
                + "; turn pictures into tensors with the model's transform (timm.data.create_transform), arrays with torch.from_numpy, "
                "or give forward, a function that runs the model on what you have"
            )
        if not image.is_floating_point():
            raise DataError(f"the images are {image.dtype}; give them as the model takes them, normalised floats")
        yield (image if image.ndim == 4 else image[None]).to(first)


def _dense(part: nn.Module, at: str, image: Tensor, reading: Reading) -> TimmModel:
    """The part as compression looks at it: a copy in float32 on the CPU, whose output is what is read of it."""
    module = copy.deepcopy(part).to("cpu", torch.float32).eval()
    _require_finite(module)
    adapt(module)
    config = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    name = str((getattr(module, "pretrained_cfg", None) or {}).get("architecture", "")) or type(module).__name__
    _, channels, height, width = image.shape
    family = family_of(module, at or name).at((channels, height, width))
    layers = _blocks(module, family, reading)
    if layers:
        family = as_layered(module, family, layers, normed=reading.normed)
    preprocess = Preprocess((channels, height, width), tuple(config["mean"]), tuple(config["std"]))
    ref = ModelRef(name=name, output=_output(module, image), layers=layers)
    return TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {"weights": "in memory"})


def _require_finite(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"the model holds NaN or infinity in {name}: its training diverged; load weights that are finite"
            )


@torch.no_grad()
def _output(module: nn.Module, image: Tensor) -> Output | None:
    """What the outputs are, by what one image [1, C, H, W] gives; None where the number of classes says it."""
    outputs = module(image)
    if isinstance(outputs, tuple):
        return "layers"
    return "tokens" if outputs.ndim > 2 else None


def _blocks(module: nn.Module, family: Family, reading: Reading) -> tuple[int, ...]:
    """The numbers of the blocks after which the model is read; () where it is what a call returns. Of a stage it is the last."""
    paths = [block.path for block in family.trunk(module)]
    if reading.way == "forward_features":
        return (len(paths) - 1,)
    return tuple(max(i for i, path in enumerate(paths) if f"{path}.".startswith(f"{part}.")) for part in reading.parts)
