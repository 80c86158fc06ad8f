"""A recipe's [model] → a dense module: timm's definition with weights from a file, a hub, or none."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain.errors import ModelError
from toolchain.families import Family, family_of
from toolchain.families.layered import LayeredFamily
from toolchain.foreign import first_line
from toolchain.outputs import CLASS_NAMES, KWARGS, WORDS, Output
from toolchain.plan import ModelRef
from toolchain.recipe import ModelSection
from toolchain.surgery.anatomy import anatomy, by, differences
from toolchain.surgery.candidates import computation
from toolchain.surgery.checkpoint import digest_of, read_checkpoint
from toolchain.surgery.fit import fitted
from toolchain.surgery.hub import Source, described, prepared, resolved
from toolchain.surgery.huggingface.folder import Folder, is_folder
from toolchain.surgery.layers import read_layers, unread_blocks
from toolchain.surgery.names import check_names, without_classifier
from toolchain.surgery.origin import Origin
from toolchain.surgery.pretrained import check_classes, config_of, load_pretrained
from toolchain.surgery.projection import projection_note, projects
from toolchain.surgery.replay import create_dense
from toolchain.surgery.resampling import TIMM
from toolchain.surgery.trained import FREE, Trained

log = logging.getLogger(__name__)

SAME = 1e-3
"""Largest difference, as a share of the largest output, that is taken for rounding between two models of equal weights."""


@dataclass(frozen=True)
class Loaded:
    """A dense module as a recipe asks for it.

    Attributes:
        ref: the plain architecture with all of its keyword arguments; rebuilds the module without a hub or a folder.
        module: in eval mode.
        family: what declares its units.
        provenance: where its weights come from; "notes" are sentences on what was done to them, "class_names" what its outputs
            stand for; absent if there are none.
        class_names: of its outputs in order, where a folder or a hub names them; else ().
        suggested_size: (height, width) that a Hugging Face folder's processor makes images of and its model runs at, where
            its positions are for another size; else None.
    """

    ref: ModelRef
    module: nn.Module
    family: Family
    provenance: dict[str, Any]
    class_names: tuple[str, ...] = ()
    suggested_size: tuple[int, int] | None = None

    def noted(self, note: str) -> Loaded:
        """The same with one more note in the provenance."""
        return replace(self, provenance={**self.provenance, "notes": [*self.provenance.get("notes", ()), note]})


def load_dense(
    section: ModelSection, *, weights: bool = True, fetch: bool = True, seed: int = 0, may_be_untrained: bool = False
) -> Loaded:
    """The module of a recipe's [model] with its weights.

    Args:
        section: the recipe's [model].
        weights: False leaves the fresh initialisation, for callers that only need shapes.
        fetch: False does not ask for pretrained weights, where a folder has them.
        seed: of the initialisation.
        may_be_untrained: whether parts for which the pretrained weights have nothing may stay at random, as where they
            are trained next, or their outputs are never used.

    Raises:
        ModelError: unknown to timm, unsupported by every family, a keyword argument that is not the architecture's or
            that timm cannot run, or weights for other classes.
        StorageError: the checkpoint cannot be read.
        ArtifactError: the checkpoint is truncated, holds code, or does not fit the model.
    """
    source = _source(section, section.kwargs)
    projected = section.output in (None, "features") and projects(source.ref)
    implied = {} if section.output is None or projected else KWARGS.get(section.output, {})
    if implied:
        source = _source(section, {**section.kwargs, **implied})
    wants_file, wants_hub = bool(section.checkpoint), section.pretrained and not section.checkpoint
    with torch.device("meta"):
        sketch = create_dense(source.ref, config=source.config)
        family = family_of(sketch, source.ref.name)  # refuse before anything is fetched or read
        declared = section.output or ("features" if projected else source.output if sketch.num_classes else None)
        output = _checked_output(sketch, family, source.ref, declared)
        read_layers(sketch, family, section.layers)
    if wants_hub and not may_be_untrained:
        check_classes(sketch)

    def fresh() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create_dense(source.ref, config=source.config)

    module = fresh()
    provenance: dict[str, Any] = {"weights": "initial"}
    notes: Sequence[str] = ()
    if wants_file and weights:
        path = Path(section.checkpoint)
        if section.layers and _is_cut(path, module, family, section.layers):
            family = read_layers(module, family, section.layers)
        notes = load_checkpoint(module, family, path, ref=source.ref, resample_patches=section.resample_patches)
        if section.name and is_folder(path):
            _check_same(module, family, described(Folder.open(path), implied), section)
        provenance = {"weights": "checkpoint", "checkpoint_sha256": digest_of(path)}
    elif wants_hub and weights and fetch:
        notes = load_pretrained(
            module,
            family,
            source,
            fresh,
            resample_patches=section.resample_patches,
            may_be_untrained=may_be_untrained,
        )
        name = source.origin or config_of(module).get("hf_hub_id") or section.name
        provenance = {"weights": "pretrained", "pretrained": str(name), "weights_sha256": digest_of_tensors(module)}
    if not isinstance(family, LayeredFamily):
        family = read_layers(module, family, section.layers)
    notes = [*notes, *_unseen(module, family), *([projection_note(source.ref)] if projected else [])]
    for note in notes:
        log.warning("%s", note)
    if notes:
        provenance["notes"] = list(notes)
    ref = source.ref.model_copy(update={"output": output, "layers": section.layers})
    names = source.class_names if len(source.class_names) == module.num_classes else ()
    if names:
        provenance[CLASS_NAMES] = list(names)
    return Loaded(ref, module, family, provenance, names, source.suggested_size)


def _is_cut(path: Path, module: nn.Module, family: Family, layers: Sequence[int]) -> bool:
    """Whether a checkpoint has the blocks that are read and none after them, as the dense model of a run that reads layers."""
    names = read_checkpoint(path, anatomy(module.state_dict())).weights.tensors
    after = [f"{block.path}." for block in unread_blocks(module, family, layers)]
    last = f"{family.trunk(module)[layers[-1]].path}."
    return any(name.startswith(last) for name in names) and not any(name.startswith(tuple(after)) for name in names)


def _source(section: ModelSection, kwargs: Mapping[str, Any]) -> Source:
    """The model that a recipe names, or that the Hugging Face folder describes which it takes weights from.

    Raises:
        ModelError, StorageError: as `load_dense`.
    """
    path = Path(section.checkpoint)
    if not (section.checkpoint and is_folder(path)):
        if section.name:
            return resolved(section.name, kwargs)
        raise ModelError(
            f"model.name is missing, and {path} does not say it: set it to that of a timm model. Only a Hugging Face "
            "folder (config.json beside its weights) can stand alone."
        )
    folder = Folder.open(path)
    if not section.name:
        return described(folder, kwargs)
    source = resolved(section.name, kwargs)
    hints = replace(source, class_names=folder.class_names, suggested_size=folder.suggested_size)
    return hints if source.config else replace(hints, config=prepared(source.ref.name, folder))


def _check_same(module: nn.Module, family: Family, source: Source, section: ModelSection) -> None:
    """Raises ModelError unless a named model with a folder's weights computes what the folder's config.json describes.

    Weights do not show which activation, how many heads or which pooling they belong to.

    Args:
        module: the named model, loaded.
        family: of it.
        source: what the folder describes.
        section: the recipe's [model], whose checkpoint is the folder.
    """
    channels, *size = family.input_size(module)
    twin = create_dense(source.ref.model_copy(update={"kwargs": {**source.ref.kwargs, "img_size": size}}))
    path, twins_family = Path(section.checkpoint), family_of(twin, source.ref.name)
    load_checkpoint(twin, twins_family, path, resample_patches=section.resample_patches)
    image = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = [(module.forward_features(image), twin.forward_features(image))]  # type: ignore[operator]
        if module.num_classes == twin.num_classes:
            pairs.append((module(image), twin(image)))
    if all(a.shape == b.shape and torch.allclose(a, b, rtol=SAME, atol=SAME * float(b.abs().max())) for a, b in pairs):
        return
    raise ModelError(
        f"with the weights of {path} the named model does not compute what its config.json describes (heads, activation, "
        f"pooling or positions differ). Leave model.name out: {source.ref.name} with the right arguments is then taken"
    )


def _check_trained(module: nn.Module, trained: Trained, ref: ModelRef, path: Path) -> None:
    """Raises ModelError unless a model computes what the script recorded that trained its weights; weights do not show it."""
    if not trained.name:
        return
    kept = {key: ref.kwargs[key] for key in FREE if key in ref.kwargs}
    try:
        with torch.device("meta"):
            twin = create_dense(ModelRef(name=trained.name, kwargs={**trained.kwargs, **kept}))
    except ModelError:  # another version of timm wrote it
        return
    stored, own = anatomy(twin.state_dict()), anatomy(module.state_dict())
    if differences(stored, own, ("classes", "positions")) or computation(twin) == computation(module):
        return  # where shapes differ the record is not whole, and the tensors say what fits them
    kwargs = "".join(f", model.kwargs.{key} = {json.dumps(value)}" for key, value in trained.kwargs.items())
    raise ModelError(
        f"{path.name} says that it was trained as {trained.name!r}, and the model would "
        f"compute something else with its weights (heads, activation, norms or pooling differ): set model.name = "
        f'"{trained.name}"{kwargs}; to load them all the same, save the state_dict alone'
    )


def _checked_output(sketch: nn.Module, family: Family, ref: ModelRef, declared: Output | None) -> Output | None:
    """What is declared of the outputs of a model on the meta device, or which features they are where it has no classifier.

    This is where timm and torch first run what they built: what they then raise comes from the keyword arguments.

    Raises:
        ModelError: it cannot be run on one image, or gives for it what is not declared.
    """
    for name, rate in ref.kwargs.items():
        if name.endswith("_rate") and not (isinstance(rate, int | float) and 0 <= rate < 1):
            raise ModelError(f"model.kwargs.{name} must be at least 0 and below 1, got {rate!r}")
    size = family.input_size(sketch)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shape = tuple(sketch(torch.empty(1, *size)).shape)
    except Exception as error:
        raise ModelError(
            f"timm cannot run {ref.name} on an image of {by(size)}: {first_line(error)}; check model.kwargs"
        ) from error
    if sketch.num_classes:
        if shape != (1, sketch.num_classes):
            raise ModelError(
                f"{ref.name} gives {by(shape)} for one image and not 1×{sketch.num_classes}, a row of logits; "
                "check model.kwargs"
            )
        return declared
    of_shape: Output = "features" if len(shape) == 2 else "tokens"
    if len(shape) < 2 or (declared or of_shape) not in (of_shape, *(["layers"] if of_shape == "tokens" else [])):
        raise ModelError(
            f"{ref.name} has no classifier and gives {by(shape)} for one image: these are {WORDS[of_shape]}; set "
            f"model.output = {of_shape!r}, or model.kwargs.num_classes to a number of classes"
        )
    return declared or of_shape


def _unseen(module: nn.Module, family: Family) -> list[str]:
    """A sentence on the pixels that no patch covers, if there are any."""
    _, height, width = family.input_size(module)
    if (patch := family.patch_size(module)) is None or not (height % patch[0] or width % patch[1]):
        return []
    rows, columns = height % patch[0], width % patch[1]
    what = f"Images of {by((height, width))} are no multiple of the patches of {by(patch)}"
    return [f"{what}: the model does not see their last {rows} rows and {columns} columns."]


def digest_of_tensors(module: nn.Module) -> str:
    """sha256 over the name, type, shape and bytes of every tensor, whoever wrote the file that they are in."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def randomise_untrained(module: nn.Module, seed: int) -> None:
    """Gives the biases, norms and LayerScales of an untrained model values that no graph tool can fold away."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.rpartition(".")[2].startswith("gamma"):
            parameter.copy_(0.5 + 0.1 * noise)
        elif parameter.ndim == 1:
            parameter.add_(0.02 * noise)


# A file


def load_checkpoint(
    module: nn.Module, family: Family, path: Path, *, ref: ModelRef | None = None, resample_patches: bool = False
) -> list[str]:
    """Loads a checkpoint strictly; returns a sentence for each thing that was chosen in it, or done to its tensors.

    Args:
        module: loaded in place, whole or not at all.
        family: of the module.
        path: a file that `read_checkpoint` reads.
        ref: what the module was made of, where it must be what the file says that was trained.
        resample_patches: whether the patch embedding of another patch size is resampled, and not refused.

    Raises:
        StorageError, ArtifactError, ModelError: as in `load_dense`.
    """
    checkpoint = read_checkpoint(path, anatomy(module.state_dict())).completed(module.state_dict())
    checkpoint.require_merged(path)
    if ref is not None and module.num_classes:  # without a classifier it is for the recipe to say what is read
        _check_trained(module, checkpoint.trained, ref, path)
    origin = Origin(
        f"the checkpoint {path.name}",
        made_for=checkpoint.made_for,
        resample_patches=resample_patches,
        positions=checkpoint.resampling or TIMM,
        beside=checkpoint.weights.beside,
    )
    result = without_classifier(fitted(checkpoint.weights.tensors, module, family, origin), module, origin)
    check_names(result, module, origin)
    module.load_state_dict(result.state, strict=True)
    log.info("loaded %s from %s", checkpoint.weights.place, path)
    return [*checkpoint.notes, *result.notes]
