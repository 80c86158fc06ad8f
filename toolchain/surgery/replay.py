"""Model folders: written from any model, and rebuilt on a fresh timm model with a strict load."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from toolchain.errors import ArtifactError, ModelError, StorageError
from toolchain.families import FAMILIES, adapt, family_of
from toolchain.files import atomic_folder, sha256
from toolchain.foreign import first_line
from toolchain.model import (
    MODEL_FILES,
    AnyModel,
    DeployModel,
    MaskedModel,
    ModelRecord,
    Preprocess,
    SlicedModel,
    TimmModel,
    describe,
)
from toolchain.plan import CompressionPlan, ModelRef
from toolchain.surgery.check import check_plan
from toolchain.surgery.factorised import FactorisedLinear, replace_module
from toolchain.surgery.layers import read_layers
from toolchain.surgery.mask import add_masks, baked
from toolchain.surgery.shapes import shapes_only
from toolchain.surgery.slice import slice_module
from toolchain.surgery.split import split_module

WEIGHTS, RECORD = "model.safetensors", "model.json"


def create_dense(ref: ModelRef, *, config: Mapping[str, object] | None = None) -> nn.Module:
    """A fresh timm model in eval mode.

    Args:
        ref: name and keyword arguments.
        config: timm's pretrained_cfg, where it is not that of the name.

    Raises:
        ModelError: timm does not know the name, or rejects a keyword argument; or there are no such layers.
    """
    tuple(FAMILIES.values())  # a package may tell timm of its models where it declares their family
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = None if config is None else dict(config)
            module: nn.Module = timm.create_model(ref.name, pretrained_cfg=given, **ref.kwargs)
    except Exception as error:  # whatever timm's constructors make of a keyword argument
        text = first_line(error)
        if "Unknown model" in text:
            near = timm.list_models(f"*{ref.name.split('_')[0]}*")
            text += _did_you_mean(ref.name, near)
        raise ModelError(f"timm cannot create {ref.name}: {text}") from error
    adapt(module)
    if ref.layers:
        read_layers(module, family_of(module, ref.name), ref.layers)
    return module.eval()


def _did_you_mean(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known or timm.list_models(), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def factorise_structure(module: nn.Module, plan: CompressionPlan) -> None:
    """Replaces the linears of a plan's low ranks by factorised ones with unset factors, in place."""
    for low in plan.low_ranks:
        linear = module.get_submodule(low.module)
        assert isinstance(linear, nn.Linear)
        replace_module(module, low.module, FactorisedLinear.like(linear, low.rank))


def _structure(module: nn.Module, dense: nn.Module) -> list[dict[str, object]]:
    """The modules whose shape is not the dense one's, for a person and for `inspect`."""
    changed: list[dict[str, object]] = []
    shapes = {n: tuple(m.weight.shape) for n, m in dense.named_modules() if isinstance(m, nn.Linear)}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and shapes.get(name) != tuple(child.weight.shape):
            changed.append({"linear": name, "shape": list(child.weight.shape)})
        elif hasattr(child, "head_dim") and child.head_dim != getattr(dense.get_submodule(name), "head_dim", None):
            changed.append({"attention": name, "head_dim": int(child.head_dim), "heads": int(child.num_heads)})
    return changed


def save_model(model: AnyModel, folder: Path) -> Path:
    """The folder, now holding model.safetensors and model.json; replaces it whole or not at all.

    Raises:
        StorageError: the folder cannot be written, or holds what is no model folder.
    """
    plain = baked(model.module)
    with shapes_only():
        dense = create_dense(model.ref)
    with atomic_folder(folder, MODEL_FILES) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, partial / WEIGHTS)
        except SafetensorError as error:  # how the library tells that a disk is full
            raise StorageError(f"cannot write {folder / WEIGHTS}: {error}") from error
        record = describe(model, sha256(partial / WEIGHTS), _structure(plain, dense))
        (partial / RECORD).write_text(record, encoding="utf-8")
    return folder


def load_model(folder: Path) -> AnyModel:
    """The model in a folder, rebuilt from its record and loaded strictly.

    Raises:
        StorageError: a file is missing.
        ArtifactError: a file is truncated, altered, or not a model of this schema.
    """
    record, weights = ModelRecord.load(folder / RECORD), folder / WEIGHTS
    if (found := sha256(weights)) != record.weights_sha256:
        raise ArtifactError(f"{weights} has sha256 {found[:12]}…, its record says {record.weights_sha256[:12]}…")
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ArtifactError(f"{weights} is not a safetensors file: {error}") from error
    plan = None if record.plan is None else CompressionPlan.from_dict(record.plan)
    return rebuild(record.model, record.stage, plan, state, record.preprocess, record.provenance)


def rebuild(
    ref: ModelRef,
    stage: str,
    plan: CompressionPlan | None,
    state: dict[str, torch.Tensor],
    preprocess: Preprocess,
    provenance: Mapping[str, object],
) -> AnyModel:
    """The model of a stage ("dense", "masked", "sliced", "deploy") from a plan and its weights.

    Raises:
        ArtifactError: the weights do not fit the structure, name for name and shape for shape.
    """
    module = create_dense(ref)
    family = family_of(module, ref.name)
    groups = tuple(family.unit_groups(module))
    if (stage == "dense") != (plan is None) or stage not in ("dense", "masked", "sliced", "deploy"):
        raise ArtifactError(f"a model of stage {stage!r} {'needs' if plan is None else 'cannot have'} a plan")
    if plan is not None:
        check_plan(plan, module, groups)
        factorise_structure(module, plan)
        if stage in ("sliced", "deploy"):
            slice_module(module, plan, groups)
        if stage == "deploy":
            split_module(module, family)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()
        raise ArtifactError(f"the weights do not fit {ref.name} ({stage}): {' '.join(first[:2])}") from error
    if plan is None:
        return TimmModel(ref, module, family, groups, preprocess, provenance)
    if stage == "masked":
        add_masks(module, plan, groups)
        return MaskedModel(ref, module.eval(), family, groups, preprocess, provenance, plan=plan)
    kind = SlicedModel if stage == "sliced" else DeployModel
    return kind(ref, module.eval(), family, groups, preprocess, provenance, plan=plan)
