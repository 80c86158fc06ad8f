"""The state of an interrupted training in one safetensors file: tensors, and scalars as JSON in its metadata."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolchain.errors import StorageError
from toolchain.files import atomic_path

logger = logging.getLogger(__name__)

METADATA = "slimvit.fit"


class Done(BaseModel):
    """How far a training is: the mean loss of each epoch, and the seconds that they took.

    Seconds count all runs of an interrupted training, and no time in between.
    """

    losses: list[float] = Field(default_factory=list)
    seconds: float = 0.0


def save(
    path: Path,
    key: str,
    done: Done,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes modules, optimiser and what is done to `path`, or leaves the file as it was.

    Raises:
        StorageError: the file cannot be written.
    """
    tensors = {f"{prefix}.{name}": value for prefix, m in modules.items() for name, value in m.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    # safetensors refuses tensors that share memory, as a mask in two parametrizations may: each gets its own copy.
    own = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    try:
        with atomic_path(path) as beside:
            save_file(own, beside, metadata={METADATA: json.dumps({"key": key, **done.model_dump()})})
    except SafetensorError as error:
        raise StorageError(f"cannot write the training checkpoint {path}: {error}") from error


def load(path: Path, key: str, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> Done | None:
    """What `save` was given as done, with modules and optimiser filled; None if there is none for this key."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            if said.get("key") != key:
                logger.info("%s belongs to another training and is not used", path)
                return None
            done = Done.model_validate(said)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        logger.warning("the training checkpoint %s cannot be read (%s); training starts anew", path, error)
        return None
    for prefix, module in modules.items():
        module.load_state_dict(_below(prefix, tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below("optimizer", tensors).items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return done


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
