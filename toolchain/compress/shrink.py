"""Shrinks a model in memory: the compress stage without a recipe, a folder or a data source."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from toolchain.compress.method import UNITS
from toolchain.compress.problem import Problem
from toolchain.compress.stage import Compress
from toolchain.compress.submodule import Submodule
from toolchain.compress.witness import Readout, witnessed
from toolchain.data.tensors import tensor_source
from toolchain.errors import BudgetError, DataError, ModelError
from toolchain.families import Family, adapt, family_of
from toolchain.model import Preprocess, TimmModel, run_stage
from toolchain.outputs import Output
from toolchain.plan import CompressionPlan, ModelRef
from toolchain.progress import SILENT, Progress
from toolchain.recipe import ALIGN, BudgetSection, CompressSection
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
    place = Submodule.of(model, at)
    with judged(model):
        run = forward or partial(_run, model)
        entering, readout = witnessed(place.part, run, images if forward else _batches(images, model))
    source, dense = tensor_source(entering), _dense(place.part, at, entering[:1], readout)
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
            f"the model cannot run on your images, a batch of {size}: {first_line(error)}. Give images [B, C, H, W] of the "
            "size and channels that it was built for"
        ) from error


def _budget(params: float) -> BudgetSection:
    if not 0 < params <= 1:
        raise BudgetError(f"params is the share of the parameters that is left, above 0 and at most 1; got {params}")
    return BudgetSection(params=float(params))


def _batches(images: Images, model: nn.Module) -> Iterator[Tensor]:
    """[B, C, H, W] of each element, where the model computes."""
    first = next(model.parameters(), torch.zeros(()))
    for each in images:
        image = each[0] if isinstance(each, list | tuple) else each
        if not isinstance(image, Tensor) or image.ndim not in (3, 4):
            raise ModelError(
                f"images are tensors [C, H, W] or [B, C, H, W], got {type(image).__name__}"
                + (f" of {tuple(image.shape)}" if isinstance(image, Tensor) else "")
                + "; give forward, a function that runs the model on what you have"
            )
        if not image.is_floating_point():
            raise DataError(f"the images are {image.dtype}; give them as the model takes them, normalised floats")
        yield (image if image.ndim == 4 else image[None]).to(first)


def _dense(part: nn.Module, at: str, image: Tensor, readout: Readout) -> TimmModel:
    """The part as compression looks at it: a copy in float32 on the CPU, whose output is what is read of it."""
    module = copy.deepcopy(part).to("cpu", torch.float32).eval()
    adapt(module)
    config = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    name = str((getattr(module, "pretrained_cfg", None) or {}).get("architecture", "")) or type(module).__name__
    _, channels, height, width = image.shape
    family = family_of(module, at or name).at((channels, height, width))
    layers = _blocks(module, family, readout)
    if layers:
        family = as_layered(module, family, layers, normed=readout.normed)
    preprocess = Preprocess((channels, height, width), tuple(config["mean"]), tuple(config["std"]))
    ref = ModelRef(name=name, output=_output(module, image), layers=layers)
    return TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {"weights": "in memory"})


@torch.no_grad()
def _output(module: nn.Module, image: Tensor) -> Output | None:
    """What the outputs are, by what one image [1, C, H, W] gives; None where the number of classes says it."""
    outputs = module(image)
    if isinstance(outputs, tuple):
        return "layers"
    return "tokens" if outputs.ndim > 2 else None


def _blocks(module: nn.Module, family: Family, readout: Readout) -> tuple[int, ...]:
    """The numbers of the blocks after which the model is read; () where it is what a call returns. Of a stage it is the last."""
    paths = [block.path for block in family.trunk(module)]
    if readout.way == "forward_features":
        return (len(paths) - 1,)
    return tuple(max(i for i, path in enumerate(paths) if f"{path}.".startswith(f"{part}.")) for part in readout.parts)
