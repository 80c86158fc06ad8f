"""Renames tensors by a table of patterns, and joins projections that timm keeps as one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolchain.errors import ArtifactError


@dataclass(frozen=True)
class Left:
    """Why tensors have no place in a timm model, to follow "was left out: "."""

    why: str


Rules = tuple[tuple[str, str | Left], ...]
"""(pattern of a whole name, what it is replaced by); the first that matches counts."""
MASKED = Left("only masked pre-training reads it")
QKV = ("query", "key", "value")
_PART = re.compile(rf".*\.({'|'.join(QKV)})\.(weight|bias)")


@dataclass(frozen=True)
class Converted:
    """Tensors under timm's names.

    Attributes:
        state: name → tensor.
        left_out: why → names in the file.
    """

    state: dict[str, Tensor]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def convert(tensors: Mapping[str, Tensor], rules: Rules) -> Converted:
    """The tensors under the names that rules give them.

    Raises:
        ArtifactError: a name that no rule knows.
    """
    state: dict[str, Tensor] = {}
    left: dict[str, tuple[str, ...]] = {}
    patterns = [(re.compile(pattern), new) for pattern, new in rules]
    for name, tensor in tensors.items():
        for pattern, new in patterns:
            if (match := pattern.fullmatch(name)) is None:
                continue
            if isinstance(new, Left):
                left[new.why] = (*left.get(new.why, ()), name)
            else:
                if (known := match.expand(new)) in state:
                    raise ArtifactError(f"it holds two tensors for timm's {known}, the second as {name}")
                state[known] = tensor
            break
        else:
            raise ArtifactError(f"it holds {name}, which config.json does not account for")
    return Converted(state, left)


def joined_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With "….query", "….key" and "….value" as one "….qkv"; a bias that only some have is zero in the others."""
    out = {name: tensor for name, tensor in state.items() if not _PART.fullmatch(name)}
    for path in _attentions(state):
        parts = [state[f"{path}.{part}.weight"] for part in QKV]
        out[f"{path}.qkv.weight"] = torch.cat(parts)
        biases = [state.get(f"{path}.{part}.bias") for part in QKV]
        if any(bias is not None for bias in biases):
            zeros = [torch.zeros(part.shape[0], dtype=part.dtype) for part in parts]
            out[f"{path}.qkv.bias"] = torch.cat(
                [zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]
            )
    return out


def keyless_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for modules whose keys have no bias: "….qkv.weight", "….q_bias" and "….v_bias".

    Raises:
        ArtifactError: keys have one.
    """
    out = joined_qkv(state)
    for path in _attentions(state):
        bias = out.pop(f"{path}.qkv.bias", None)
        if bias is None:
            continue
        query, key, value = bias.chunk(3)
        if key.any():
            raise ArtifactError(f"it holds {path}.key.bias, for which timm's module has no place")
        out[f"{path}.q_bias"], out[f"{path}.v_bias"] = query, value
    return out


def _attentions(state: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(".query.weight") for name in state if name.endswith(".query.weight")]
