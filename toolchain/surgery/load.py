"""A recipe's [model] → a dense module: timm's definition with weights from a file, a hub, or none."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm.models
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from toolchain.artifact import sha256
from toolchain.errors import ArtifactError, ModelError, StorageError
from toolchain.families import Family, family_of
from toolchain.plan import ModelRef
from toolchain.recipe import ModelSection
from toolchain.surgery.replay import create_dense

log = logging.getLogger(__name__)


def load_dense(
    section: ModelSection, *, weights: bool = True, seed: int = 0
) -> tuple[nn.Module, Family, dict[str, Any]]:
    """(module in eval mode, its family, where its weights come from).

    Args:
        section: the recipe's [model].
        weights: False leaves the fresh initialisation, where shapes are all that is wanted.
        seed: of the initialisation.

    Raises:
        ModelError: unknown to timm, unsupported by every family, a keyword argument that is not the architecture's, or
            the checkpoint has another number of classes.
        StorageError: the checkpoint cannot be read.
        ArtifactError: the checkpoint is truncated, holds code, or does not fit the model.
    """
    try:
        ref = ModelRef(name=section.name, kwargs=section.kwargs)
    except ValidationError as error:
        raise ModelError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    with torch.device("meta"):
        family = family_of(create_dense(ref), section.name)  # refuse before anything is fetched or read
    wants_file, wants_hub = bool(section.checkpoint) and weights, section.pretrained and weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = create_dense(ref, pretrained=wants_hub and not wants_file)
    if wants_file:
        path = Path(section.checkpoint)
        load_checkpoint(module, family, path)
        return module, family, {"weights": "checkpoint", "checkpoint_sha256": sha256(path)}
    if wants_hub:
        tag = getattr(module, "pretrained_cfg", {}).get("hf_hub_id") or section.name
        return module, family, {"weights": "pretrained", "pretrained": str(tag), "weights_sha256": _digest(module)}
    return module, family, {"weights": "initial"}


def _digest(module: nn.Module) -> str:
    """sha256 over the name, type, shape and bytes of every tensor: a hub may change what lies behind a name."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
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


def load_checkpoint(module: nn.Module, family: Family, path: Path) -> None:
    """Loads a .safetensors or .pth file strictly; official DeiT's `{"model": …}` and EMA layouts are understood.

    Raises:
        StorageError, ArtifactError, ModelError: as in `load_dense`.
    """
    raw = _read(path)
    try:
        state = family.convert_checkpoint(raw, module)
    except Exception as error:  # tensors of unexpected shapes make timm's conversions fail in any way there is
        raise ArtifactError(
            f"the checkpoint {path} does not fit the model: its tensors cannot be converted ({_first_line(error)})"
        ) from error
    wanted = module.state_dict()
    head = next((name for name in ("head.weight", "head_dist.weight") if name in wanted and name in state), None)
    if head is not None and state[head].ndim == 2 and state[head].shape[0] != wanted[head].shape[0]:
        raise ModelError(
            f"the checkpoint {path} has {state[head].shape[0]} classes, the model {wanted[head].shape[0]}; "
            f"set model.kwargs.num_classes = {state[head].shape[0]}"
        )
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ArtifactError(
            f"the checkpoint {path} does not fit the model: {' '.join(lines[1:2]) or lines[0]}"
        ) from error
    log.info("loaded %s", path)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise StorageError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    try:
        state = timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler fail in any way there is
        if _is_refused_code(error, start):
            raise ArtifactError(
                f"the checkpoint {path} holds pickled code, which slimvit never executes; "
                "save its tensors as .safetensors instead"
            ) from error
        raise ArtifactError(f"the checkpoint {path} is truncated or not a checkpoint ({_first_line(error)})") from error
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ArtifactError(f"the checkpoint {path} holds no tensors")
    return tensors


def _is_refused_code(error: BaseException, start: bytes) -> bool:
    """Whether torch refused to run something, in a file of these first bytes; timm may wrap the unpickler's error."""
    cause = error if isinstance(error, UnpicklingError) else error.__cause__ or error.__context__ or error
    if isinstance(cause, UnpicklingError):
        is_pickle = start in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        return is_pickle or "Unsupported operand" not in str(cause)  # which is what it says of a page of HTML
    return "TorchScript" in str(cause)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
