"""Loads pretrained weights through timm; refuses or notes what timm leaves at random or changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm.models
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from torch import Tensor, nn

from toolchain.errors import ModelError, SlimvitError
from toolchain.families import Family
from toolchain.foreign import first_line
from toolchain.surgery.anatomy import by, differences, remedy
from toolchain.surgery.fit import fitted
from toolchain.surgery.hub import Source, local_weights
from toolchain.surgery.names import CLASSIFIERS, check_names, keywords, without_classifier
from toolchain.surgery.origin import Fitted, Origin, left_out, some
from toolchain.surgery.refusals import refusal
from toolchain.surgery.resampling import FLEXIBLE, TIMM

PRETRAINED = "the pretrained weights"


def config_of(module: nn.Module) -> dict[str, Any]:
    """What timm knows of a module's pretrained weights: its pretrained_cfg."""
    return dict(getattr(module, "pretrained_cfg", None) or {})


def check_classes(sketch: nn.Module) -> None:
    """Raises ModelError, before anything is fetched, where timm would start the classifier anew."""
    stored, wanted = config_of(sketch).get("num_classes"), _classes(sketch)
    if wanted and stored is not None and stored != wanted:
        raise ModelError(_untrained_classifier(int(stored), wanted))


def _classes(module: nn.Module) -> int:
    return int(module.num_classes)  # type: ignore[arg-type]


def _untrained_classifier(stored: int, wanted: int) -> str:
    """The refusal of a classifier at random, with the ways out."""
    have = f"have {stored} classes" if stored else "have no classifier"
    keep = (
        'Take num_classes out of model.kwargs to keep the pretrained classes: data.source = "images:PATH" calibrates '
        "without labels, data.classes maps the folders of a subset to them. "
        if stored
        else ""
    )
    if not stored:
        keep = "model.kwargs.num_classes = 0 gives features, without a classifier. "
    return (
        f"{PRETRAINED} {have} and the model {wanted}, so its classifier would be random. {keep}"
        f"For {wanted} classes of your own, set model.checkpoint to weights trained on them, or add [train]."
    )


def load_pretrained(
    module: nn.Module,
    family: Family,
    source: Source,
    fresh: Callable[[], nn.Module],
    *,
    resample_patches: bool = False,
    may_be_untrained: bool = False,
) -> list[str]:
    """Loads pretrained weights in place; a sentence for each way in which the module is not what they were trained as.

    Parameters are set to NaN before timm loads, so that every parameter that its loaders leave out is found.

    Args:
        module: as `fresh` gives it.
        family: of the module.
        source: where the weights are.
        fresh: the module as it was created, for parts that nothing is loaded into.
        resample_patches: whether the patch embedding of another patch size is resampled, and not refused.
        may_be_untrained: whether such parts are allowed.

    Raises:
        ModelError: the weights cannot be fetched, do not fit, or leave a part of the module at random.
        StorageError, ArtifactError: of a folder's weights, as `read_checkpoint`.
    """
    config, architecture = config_of(module), source.ref.name
    size: Sequence[int] = config.get("input_size") or ()
    made_for = (size[1], size[2]) if len(size) == 3 else None
    stored = local_weights(source, config)
    if stored is not None:
        stored = stored.completed(module.state_dict())
        config |= {"state_dict": dict(stored.weights.tensors), "source": "", "custom_load": False}
    usual = FLEXIBLE if "flexi" in architecture else TIMM
    origin = Origin(
        PRETRAINED,
        plural=True,
        made_for=made_for,
        resample_patches=resample_patches,
        positions=(stored.resampling if stored else None) or usual,
        patches=usual,
        may_differ=frozenset(("classes", "in_chans")),
        beside="" if stored is None else stored.weights.beside,
        fault=ModelError,
    )
    results: list[Fitted] = []

    def convert(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        result = without_classifier(fitted(state, model, family, origin), module, origin)
        results.append(result)
        wanted = model.state_dict()
        state = {name: tensor for name, tensor in result.state.items() if name in wanted}
        if not config.get("label_offset"):  # a classifier of other classes is left out, whatever the config says of it
            for weight in [f"{name}.weight" for name in CLASSIFIERS if f"{name}.weight" in state]:
                if state[weight].shape != wanted[weight].shape:
                    state = {name: tensor for name, tensor in state.items() if name.partition(".")[0] != weight[:-7]}
        return state

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(math.nan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timm.models.load_pretrained(
                module,
                pretrained_cfg=config,
                num_classes=_classes(module),
                in_chans=family.input_size(module)[0],
                filter_fn=convert,
                strict=False,
            )
    except SlimvitError:
        raise
    except Exception as error:  # whatever timm, the hub's client and torch make of it
        if results:
            check_names(results[0], module, origin)
        place = str(config_of(module).get("hf_hub_id") or architecture)
        if isinstance(error, HfHubHTTPError | EntryNotFoundError):
            raise ModelError(f"{PRETRAINED} cannot be fetched: {refusal(error, place)}") from error
        raise ModelError(
            f"timm cannot load {PRETRAINED} of {architecture}: {first_line(error)}. "
            "Without a network set model.checkpoint to a local file, or model.pretrained = false"
        ) from error
    untrained = [name for name, value in module.named_parameters() if torch.isnan(value).any()]
    unused = [name for result in results for name in result.state if name not in module.state_dict()]
    if not may_be_untrained:
        _refuse_untrained(untrained, unused, module, results, origin)
    if untrained:
        _restore(module, fresh(), untrained)
    chosen = [] if stored is None else stored.notes
    return [*chosen, *_notes(untrained, unused, module, results, made_for, family)]


def _is_classifier(name: str) -> bool:
    return name.partition(".")[0] in CLASSIFIERS


def _refuse_untrained(
    untrained: Sequence[str], unused: Sequence[str], module: nn.Module, results: Sequence[Fitted], origin: Origin
) -> None:
    """Raises ModelError if a part of the module was left at random, or a part of the weights was left out."""
    if untrained and all(map(_is_classifier, untrained)) and not unused:
        stored = results[0].anatomy.classes if results else config_of(module).get("num_classes")
        raise ModelError(_untrained_classifier(int(stored or 0), _classes(module)))
    if not untrained and not unused:
        return
    parts = [f"lack {some(untrained)}"] if untrained else []
    parts += [f"hold {some(unused)}, which the model has not"] if unused else []
    where, way = "", "Take out the keyword argument that changes it, or add [train]."
    for result in results[:1]:
        ignored = {"positions", "in_chans", *result.adapted}
        unequal = differences(result.anatomy, result.model, ignored)
        if do := remedy(result.anatomy, result.model, ignored, keywords(module)):
            way = f"To use them, {do}."
        where = f" They have {', '.join(unequal.values())}." if unequal else ""
    raise ModelError(
        f"{origin.what} do not fit model.kwargs: they {' and '.join(parts)}.{where} "
        + (f"{origin.beside[0].upper()}{origin.beside[1:]}. " if origin.beside else "")
        + way
    )


def _notes(
    untrained: Sequence[str],
    unused: Sequence[str],
    module: nn.Module,
    results: Sequence[Fitted],
    made_for: tuple[int, int] | None,
    family: Family,
) -> list[str]:
    """One sentence for each way in which the module is not what the weights were trained as."""
    notes = [note for result in results for note in result.notes]
    channels, height, width = family.input_size(module)
    config = config_of(module)
    if untrained:
        is_head = all(map(_is_classifier, untrained))
        what = "The classifier" if is_head else f"What holds {some(untrained)}"
        stored = results[0].anatomy.classes if results else config.get("num_classes")
        notes.append(
            f"{what} started untrained: {PRETRAINED} have nothing for it"
            + (f" ({stored or 'no'} classes, the model {_classes(module)})." if is_head else ".")
        )
    if unused:
        notes.append(f"Of {PRETRAINED}, {left_out(unused)}: the model has no such part.")
    stored_channels = results[0].anatomy.in_chans if results else (config.get("input_size") or (channels,))[0]
    if stored_channels is not None and stored_channels != channels:
        how = "summed" if channels == 1 else "repeated and scaled"
        notes.append(
            f"The patch embedding of {PRETRAINED} reads {stored_channels} "
            f"channel{'s' if stored_channels > 1 else ''} and the model {channels}: timm {how} "
            "its weights."
        )
    adapted = any("positions" in result.adapted for result in results)
    if made_for is not None and made_for != (height, width) and not adapted:
        notes.append(
            f"{PRETRAINED.capitalize()} were made for images of {by(made_for)} pixels; the model's are {by((height, width))}."
        )
    return notes


@torch.no_grad()
def _restore(module: nn.Module, fresh: nn.Module, names: Sequence[str]) -> None:
    """Gives parameters the values that they were created with."""
    for name in names:
        module.get_parameter(name).copy_(fresh.get_parameter(name))
