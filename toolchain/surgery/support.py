"""Determines how far each timm model is supported, from the model built on the meta device."""

from __future__ import annotations

import difflib
import fnmatch
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import timm
from torch import nn

from toolchain.errors import ModelError
from toolchain.families import FAMILIES, Family, family_of
from toolchain.plan import ModelRef
from toolchain.surgery.replay import create_dense
from toolchain.surgery.shapes import shapes_only


@dataclass(frozen=True)
class Support:
    """Of one timm name.

    Attributes:
        name: of the model.
        module: of `timm.models`, which it comes from.
        support: "full" where every block can lose neurons, and head dims or rank in its attention; "partial" where some
            block cannot lose one of these; "refused" where nothing can be done.
        reason: why it is no more than that, or what stays as it is in a full one; "" where all can shrink.
        params: its parameters; None if no family is responsible for its module, or timm cannot build it.
    """

    name: str
    module: str
    support: Literal["full", "partial", "refused"]
    reason: str = ""
    params: int | None = None


def timm_names(pattern: str = "*") -> list[str]:
    """The names that match a wildcard, in timm's order; those of other packages that have a family are among them.

    A wildcard with a dot is one of names with the tag of their pretrained weights, such as "vit_tiny_patch16_224.*".
    """
    tuple(FAMILIES.values())  # a package may tell timm of its models where it declares their family
    names = timm.list_pretrained() if "." in pattern else timm.list_models()
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def near_names(pattern: str) -> str:
    """Wildcards, or names, that match something where a wildcard matches nothing, as a hint: "try '*vit_tiny*'"."""
    plain = pattern.strip("*").lower().partition(".")[0]
    for wildcard in (f"{plain}*", f"*{plain}*") if plain else ():
        if timm_names(wildcard):
            return f"try {wildcard!r}"
    near = difflib.get_close_matches(plain, timm.list_models(), n=1)
    return f"did you mean {near[0]!r}?" if near else "try 'deit*' or '*vit*'"


def supports(names: Iterable[str]) -> list[Support]:
    """How far each of some timm models is supported, in order."""
    gc.freeze()  # a third of the time would go into looking for garbage among what was imported
    try:
        return [support_of(name) for name in names]
    finally:
        gc.unfreeze()


def support_of(name: str) -> Support:
    """How far a timm model is supported; only one whose module a family claims is built."""
    home: str = timm.models.model_entrypoint(name).__module__
    module = home.rpartition(".")[2]
    if not any({home, module} & set(family.timm_modules) for family in FAMILIES.values()):
        return Support(name, module, "refused", f"no family is responsible for timm's {module}")
    try:
        with shapes_only():
            model = create_dense(ModelRef(name=name))
    except ModelError as error:
        return Support(name, module, "refused", _reason(error))
    return judge(model, name, module)


def judge(model: nn.Module, name: str, module: str) -> Support:
    """How far a model is supported: `create_dense` made it, of shapes alone or with weights."""
    params = sum(parameter.numel() for parameter in model.parameters())
    try:
        family = family_of(model, name)
    except ModelError as error:
        return Support(name, module, "refused", _reason(error), params)
    missing = _missing(model, family)
    reasons = family.restrictions(model) or missing
    return Support(name, module, "partial" if missing else "full", "; ".join(reasons), params)


def _reason(error: ModelError) -> str:
    """What a table says of it: without the name, and without the command that draws the table."""
    return str(error).partition(": ")[2].removesuffix(" See `slimvit models` for what is.")


def _missing(model: nn.Module, family: Family) -> list[str]:
    """What keeps support from being full, a clause for each kind."""
    groups = [group for group in family.unit_groups(model) if group.sliceable]
    neurons = [group.module for group in groups if group.unit == "mlp_hidden"]
    attention = [group.module for group in groups if group.unit == "head_dim"]
    attention += [item.linear for item in family.factorizable(model) if item.kind == "attention"]
    blocks = [block.path for block in family.blocks(model)]
    clauses = []
    for what, places in (("feed-forward neurons", neurons), ("attention", attention)):
        if without := [path for path in blocks if not any(f"{place}.".startswith(f"{path}.") for place in places)]:
            clauses.append(f"{what} cannot shrink in {len(without)} of {len(blocks)} blocks")
    return clauses
