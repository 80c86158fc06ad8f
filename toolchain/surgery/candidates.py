"""Finds timm's architectures that fit a checkpoint, from the names and shapes of its tensors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook as on_every_parameter

from toolchain.errors import ArtifactError, ModelError
from toolchain.families import FAMILIES
from toolchain.plan import ModelRef
from toolchain.surgery.anatomy import Anatomy, anatomy, differences, others
from toolchain.surgery.checkpoint import Checkpoint, read_checkpoint
from toolchain.surgery.names import head_of_layers
from toolchain.surgery.replay import create_dense
from toolchain.surgery.shapes import shapes_only

log = logging.getLogger(__name__)
FREE = ("classes", "positions")
"""Fields of `Anatomy` that no architecture fixes: the number of classes, and the size of images."""


def architecture_of(path: Path, name: str = "") -> tuple[str, dict[str, Any]]:
    """(name, keyword arguments) of the timm model that a checkpoint's tensors fit.

    It is the one that the training script recorded. Without one, where several architectures fit and compute the same, it is
    the first by timm's own order. The keyword arguments are those that were recorded for it, and the number of classes and the
    size of images, where these are not the architecture's.

    Args:
        path: the checkpoint.
        name: of the architecture, if that is known.

    Raises:
        StorageError, ArtifactError: as `read_checkpoint`.
        ModelError: none fits, or several that differ in what no tensor says, such as the number of heads.
    """
    checkpoint = read_checkpoint(path)
    checkpoint.require_merged(path)
    trained = checkpoint.trained
    name = name or trained.name or _name(path, checkpoint)
    kwargs = dict(trained.kwargs) if name.partition(".")[0] == trained.name.partition(".")[0] else {}
    wanted = _sketch(name, kwargs).state_dict()
    completed = checkpoint.completed(wanted)
    if not completed.anatomy.classes and (why := head_of_layers(completed.weights.tensors)):
        log.warning("checkpoint %s: %s", path.name, why)
    return name, {**kwargs, **_arguments(completed.anatomy, anatomy(wanted))}


def _arguments(stored: Anatomy, usual: Anatomy) -> dict[str, int]:
    arguments: dict[str, int] = {}
    if None not in (stored.classes, usual.classes) and stored.classes != usual.classes:
        arguments["num_classes"] = int(stored.classes or 0)
    if stored.grid and usual.grid and stored.grid != usual.grid and stored.patch_size:
        arguments["img_size"] = stored.grid[0] * stored.patch_size[0]
    return arguments


def _sketch(name: str, kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    with shapes_only():
        return create_dense(ModelRef(name=name, kwargs=dict(kwargs or {})))


def _name(path: Path, checkpoint: Checkpoint) -> str:
    stored = checkpoint.anatomy
    if stored.embed_dim is None or stored.depth is None or stored.patch_size is None:
        whose = others(checkpoint.weights.tensors)
        raise ArtifactError(
            f"no timm architecture can be told from the names in {path.name}"
            + (f", which are those of {whose}" if whose else "")
            + "; name the model with --model"
        )
    tensors = checkpoint.weights.tensors
    alike = {
        name: (_shared(tensors, sketch), _kind(sketch)) for name, sketch in _sketches(stored) if _fits(stored, sketch)
    }
    fitting = {name: kind for name, (shared, kind) in alike.items() if shared == max(alike.values())[0]}
    if not fitting:
        raise ModelError(
            f"no timm architecture has the shapes in {path.name} (width {stored.embed_dim}, depth {stored.depth}, patches "
            f"of {stored.patch_size[0]}); name the model with --model, and what differs with --set model.kwargs.…"
        )
    kinds = dict[str, str]()
    for name, kind in fitting.items():
        kinds.setdefault(kind, name)
    if len(kinds) > 1:
        raise ModelError(
            f"the shapes in {path.name} fit architectures that differ in what no tensor says: {', '.join(kinds.values())}; "
            "choose one with --model"
        )
    return next(iter(kinds.values()))


def _sketches(stored: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    """(name, model without memory) of the architectures of all families whose names do not speak against the shapes."""
    assert stored.patch_size is not None
    homes = {home for family in FAMILIES.values() for home in family.timm_modules}
    mark = f"patch{stored.patch_size[0]}"
    for name in timm.list_models():
        home = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        if home not in homes or ("patch" in name and not re.search(rf"{mark}(?!\d)", name)):
            continue
        try:
            with _only_of_kernel(stored):
                sketch = _sketch(name)
        except ModelError:  # of another kernel, or one that timm itself cannot build
            continue
        yield name, sketch


@contextmanager
def _only_of_kernel(stored: Anatomy) -> Iterator[None]:
    """In this block, building a model with another patch embedding fails at once, before its blocks are built."""
    kernel = (stored.embed_dim, stored.in_chans, *(stored.patch_size or ()))
    first = True

    def look(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal first
        if first and parameter is not None and parameter.ndim == len(kernel):
            first = False
            if parameter.shape[1] == stored.in_chans and parameter.shape != kernel:
                raise ModelError(f"its patch embedding is {tuple(parameter.shape)}, and {kernel} is wanted")

    hook = on_every_parameter(look)
    try:
        yield
    finally:
        hook.remove()


def _fits(stored: Anatomy, sketch: nn.Module) -> bool:
    return not differences(stored, anatomy(sketch.state_dict()), FREE)


def _shared(tensors: Mapping[str, Tensor], sketch: nn.Module) -> float:
    """The share of tensors, by name and shape, that a checkpoint and a model have both, of all that either has."""
    stored, own = ({(name, tensor.shape) for name, tensor in each.items()} for each in (tensors, sketch.state_dict()))
    return len(own & stored) / len(own | stored)


def _kind(sketch: nn.Module) -> str:
    """What a model computes, and of what pixels, apart from its weights, its classes and the size of its images."""
    config = resolve_model_data_config(sketch)  # type: ignore[no-untyped-call]
    return f"{computation(sketch)}\n{config['mean']} {config['std']}"


def computation(model: nn.Module) -> str:
    """What a model computes, as text, apart from its weights, its classes, the size of its images and what training drops."""
    parts = [
        f"{path}: {type(part).__name__} {getattr(part, 'num_heads', '')} {part.extra_repr()}"
        for path, part in model.named_modules()
        if path != "head" and not path.startswith("patch_embed") and "drop" not in path.rpartition(".")[2]
    ]
    return "\n".join([*parts, str(getattr(model, "global_pool", ""))])
