"""Shrinks a model in memory: the compress stage without a recipe, a folder or a data source."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from pydantic import ValidationError
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from toolchain.compress.closed_form import LOOKED_AT
from toolchain.compress.damage import difference
from toolchain.compress.method import UNITS
from toolchain.compress.problem import Problem
from toolchain.compress.stage import Compress
from toolchain.compress.submodule import CHECKPOINTING, Submodule
from toolchain.compress.witness import Readout, witnessed
from toolchain.data.tensors import tensor_source
from toolchain.defaults import PARAMS
from toolchain.errors import BudgetError, DataError, ModelError
from toolchain.families import Family, Layered, adapt, family_of
from toolchain.families.blocks import linear
from toolchain.foreign import first_line
from toolchain.likelihood import outputs_of, parts_of
from toolchain.model import DeployModel, MaskedModel, Preprocess, TimmModel, run_stage
from toolchain.outputs import FEATURES, WORDS, Output, output_of
from toolchain.plan import CompressionPlan, ModelRef
from toolchain.progress import SILENT, Progress
from toolchain.recipe import ALIGN, BudgetSection, CompressSection
from toolchain.settings import explain, share_of
from toolchain.surgery.layers import as_layered
from toolchain.surgery.projection import projects
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.evaluate import judged

log = logging.getLogger(__name__)
JOINT = CompressSection()
STARTED = 0.03
"""Standard deviation below which the weights of a classifier look as timm starts them (0.02, or 0)."""
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
    params: float | None = None,
    *,
    macs: float | None = None,
    size: str | None = None,
    at: str = "",
    forward: Callable[[Any], object] | None = None,
    output: Output | None = None,
    compress: CompressSection = JOINT,
    progress: Progress = SILENT,
) -> Shrunk:
    """A smaller model that gives nearly the same outputs, and its plan; nothing is trained, and no label is read.

    The weights are solved for on the images, as by `method = "joint"` of a recipe. What is read of the part is seen from the
    larger model: the output of a call, the tokens of `forward_features`, or the layers of `forward_intermediates`. What the
    numbers of a call mean cannot be seen. Two or more are taken for class logits, with a line on the log; `output` says
    otherwise.

    Args:
        model: a timm model of a supported family, or a larger one with such a model in it.
        images: as the model takes them, already normalised; each a tensor [C, H, W] or a batch [B, C, H, W], alone or first
            in a tuple, as a DataLoader gives them. The first 1024 are read. With `forward`, whatever that takes.
        params, macs: the shares of the parameters and of the multiply-accumulates of what shrinks that are left.
        size: of its weights in fp32, such as "12 MB" or "45%". Several limits hold together; without any, params is 0.5.
        at: path of the part that shrinks, such as "backbone.body"; it is replaced in `model`. "" is the model itself, which
            is left as it is.
        forward: what runs the larger model on one element of `images`; it must reach the part. If absent, `model` is called.
        output: what the outputs of a call of the part are: "logits" of one class of many, "multi-label", "regression" or
            "features". What is preserved follows from it: a softmax, sigmoids, or the numbers themselves.
        compress: how, as in [compress] of a recipe.
        progress: told how far it is.

    Raises:
        ModelError: what shrinks is of no supported family, the larger model does not reach it, it cannot be replaced, or its
            outputs are not what `output` says.
        DataError: there are too few images, or they differ in size.
        BudgetError: a limit is none, or out of reach; the message names the range.
    """
    budget = _budget(params, macs, size)
    if output not in (None, *get_args(Output)):
        raise ModelError(f"output is one of {', '.join(map(repr, get_args(Output)))}, got {output!r}")
    if torch.is_inference_mode_enabled():
        raise ModelError("shrink needs gradients: call it outside of torch.inference_mode()")
    with _exact():
        place = Submodule.of(model, at)
    with judged(model), torch.compiler.set_stance("force_eager"):  # what module.compile() made would not be looked into
        run = forward or partial(_run, model)
        entering, readout = witnessed(place.part, run, images if forward else _batches(images, model))
    _tell_order(images, len(entering))
    with _exact():
        source, dense = tensor_source(entering), _dense(place.copied(), at, entering[:1], readout, output)
        problem = Problem.of(dense, compress, budget, dict.fromkeys(UNITS, compress.align or ALIGN))
        masked = run_stage(Compress(source, progress=progress), problem).artifact
        smaller = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
        _require_same(masked, smaller, source.split("validation").spread(LOOKED_AT))
    return Shrunk(place.fill(smaller.module), smaller.plan)


@contextmanager
def _exact() -> Iterator[None]:
    """A block that computes in float32 on the CPU whatever the caller's autocast, defaults and precision of products are."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # it replaces its module
    usual, precision = torch.get_default_dtype(), products.fp32_precision
    torch.set_default_dtype(torch.float32)
    products.fp32_precision = "ieee"  # else CPUs that can multiply in bfloat16 do
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        with device, torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(usual)
        products.fp32_precision = precision


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        model(images)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        size = "×".join(map(str, images.shape))
        raise ModelError(
            f"the model cannot run on your images, a batch of {size}: {first_line(error).rstrip('.')}. Give images [B, C, H, W] of the "
            "size and channels that it was built for, or forward, a function that runs the model on what you have"
        ) from error


def _budget(params: float | None, macs: float | None, size: str | None) -> BudgetSection:
    shares = dict[str, float | None]()
    for name, share in (("params", params), ("macs", macs)):
        try:
            shares[name] = None if share is None else share_of(share)
        except ValueError as error:
            raise BudgetError(f"{name} {error}") from None
    try:
        budget = BudgetSection(params=shares["params"], macs=shares["macs"], size=size)
    except ValidationError as error:
        raise BudgetError(explain(error, BudgetSection, "budget")) from None
    return BudgetSection(params=PARAMS) if budget.is_empty else budget


def _batches(images: Images, model: nn.Module) -> Iterator[Tensor]:
    """[B, C, H, W] of each element, where the model computes."""
    first = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
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


def _tell_order(images: Images, count: int) -> None:
    """Says on the log that only the first of a data set were read, in its own order: that is often the order of classes."""
    data: object = images
    order: object = None
    dropped = 0
    if isinstance(images, DataLoader):
        batches, data = images.batch_sampler, images.dataset
        order = images.sampler if batches is None else getattr(batches, "sampler", batches)
        if images.drop_last and images.batch_size:
            dropped = images.batch_size - 1
    if (
        not isinstance(data, Dataset)
        or not hasattr(data, "__len__")
        or isinstance(data, IterableDataset)
        or not isinstance(order, SequentialSampler | None)
        or (isinstance(data, Subset) and list(data.indices) != sorted(data.indices))  # as random_split makes them
    ):
        return
    if (whole := len(data)) - dropped > count:
        log.warning(
            "The first %d of %d images were read, in the order of the data set. If that is by class, as it is of folders, most classes are "
            "not among them: give a DataLoader with shuffle=True.",
            count,
            whole,
        )


def _dense(module: nn.Module, at: str, image: Tensor, readout: Readout, declared: Output | None) -> TimmModel:
    """A copy of the part as compression looks at it: in float32 on the CPU, in place, its output what is read of the part."""
    module = module.to("cpu", torch.float32).eval()
    for each in module.modules():  # which would hide the gradients within blocks
        if hasattr(each, CHECKPOINTING):
            setattr(each, CHECKPOINTING, False)
    _require_finite(module)
    adapt(module)
    config = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    name = str((getattr(module, "pretrained_cfg", None) or {}).get("architecture", "")) or type(module).__name__
    _, channels, height, width = image.shape
    family = family_of(module, at or name).at((channels, height, width))
    groups = tuple(family.unit_groups(module))
    for path in (
        *(span.linear for group in groups for span in group.spans),
        *(item.linear for item in family.factorizable(module)),
    ):
        linear(module, path)
    layers = _blocks(module, family, readout)
    if layers:
        family = as_layered(module, family, layers, normed=readout.normed)
    preprocess = Preprocess((channels, height, width), tuple(config["mean"]), tuple(config["std"]))
    ref = ModelRef(name=name, output=_output(module, name, image, declared), layers=layers)
    if declared is None and ref.output not in FEATURES:
        _tell_untrained(module, name, family.classifier(module))
    return TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {"weights": "in memory"})


def _require_same(masked: MaskedModel, smaller: DeployModel, images: Dataset[tuple[Tensor, int]]) -> None:
    """Raises ModelError unless the smaller model computes what the masked one does, of which it was made."""
    expected = parts_of(outputs_of(masked.module, images))
    if fault := difference(expected, lambda: parts_of(outputs_of(smaller.module, images))):
        raise ModelError(
            f"the smaller {masked.ref.name} is not what was decided: its outputs {fault}. A forward of its own, or of one of its parts, "
            "may count on the widths of before: take it off first, and put it back with the widths of the smaller model's linears"
        )


def _tell_untrained(module: nn.Module, name: str, classifier: str | None) -> None:
    """Says on the log that the linear that ends in the outputs looks as timm starts it, where it does."""
    if classifier is None:
        return
    head = linear(module, classifier)
    if head.bias is not None and not bool(head.bias.any()) and float(head.weight.detach().std()) < STARTED:
        log.warning(
            "The classifier of %s looks as timm starts it: its biases are all 0, and its weights small. If it was never trained, its outputs "
            "are preserved for nothing: train it first, or call model.reset_classifier(0) and give the smaller model a classifier. If it "
            'was, output="logits" says so.',
            name,
        )


def _require_finite(module: nn.Module) -> None:
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ModelError(
                f"{name} of the model is no tensor: it was quantised. Shrink it before, and quantise what comes back"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"the model holds NaN or infinity in {name}: its training diverged; load weights that are finite"
            )


@torch.no_grad()
def _output(module: nn.Module, name: str, image: Tensor, declared: Output | None) -> Output | None:
    """What the outputs are, by what one image [1, C, H, W] gives and by what was declared; None where `num_classes` says it.

    Raises:
        ModelError: they cannot be what was declared.
    """
    outputs = module(image)
    if not isinstance(outputs, Tensor) and not isinstance(module, Layered):
        raise ModelError(
            f"a call of {name} returns a {type(outputs).__name__}, of which cannot be told what is to be preserved: pass forward = "
            "lambda images: model.forward_features(images), with images [B, C, H, W], and the tokens before its head are"
        )
    if isinstance(outputs, Tensor) and outputs.ndim < 2:
        raise ModelError(
            f"a call of {name} gives {list(outputs.shape)} for one image, and [1, numbers] is wanted: squeeze its outputs outside of it"
        )
    seen: Output | None = "layers" if isinstance(outputs, tuple) else "tokens" if outputs.ndim > 2 else None
    if seen is None and _is_headless(module):
        seen = "features"
    if declared is not None:
        if seen not in (None, declared):
            raise ModelError(f"output is {declared!r}, but what is read of {name} are {WORDS[seen]}: leave output out")
        if declared in ("tokens", "layers") and seen is None:
            raise ModelError(f"output is {declared!r}, but what is read of {name} is one vector for an image")
        return declared
    if seen is None and projects(ModelRef(name=name, kwargs={"num_classes": outputs.shape[-1]})):
        return "features"
    if seen is not None:
        return seen
    if outputs.shape[-1] > 1:
        log.warning(
            "The %d outputs of %s are taken for class logits, of which a softmax is preserved. If they are not, pass output="
            '"regression", "multi-label" or "features"; output="logits" is silent.',
            outputs.shape[-1],
            name,
        )
    usual = output_of(None, outputs.shape[-1])
    return None if usual == output_of(None, int(getattr(module, "num_classes", outputs.shape[-1]))) else usual


def _is_headless(module: nn.Module) -> bool:
    """Whether what it gives is what a classifier would read; a head may have been put on, or taken off, since it was built."""
    head = getattr(module, "head", None)
    if isinstance(head, nn.Identity):
        return True
    return not getattr(module, "num_classes", 1) and (head is None or next(head.parameters(), None) is None)


def _blocks(module: nn.Module, family: Family, readout: Readout) -> tuple[int, ...]:
    """The numbers of the blocks after which the model is read; () where it is what a call returns. Of a stage it is the last."""
    paths = [block.path for block in family.trunk(module)]
    if readout.way == "forward_features":
        return (len(paths) - 1,)
    return tuple(max(i for i, path in enumerate(paths) if f"{path}.".startswith(f"{part}.")) for part in readout.parts)
