"""Model families: one file here and one line in `FAMILIES`, or an object that another package registers."""

from __future__ import annotations

from torch import nn

from toolchain.errors import ModelError
from toolchain.families.base import (
    AttentionSite,
    Block,
    Branch,
    Bridge,
    Factorizable,
    Family,
    Parallel,
    Pooling,
    Span,
    Step,
    UnitGroup,
    pre_norm,
)
from toolchain.families.layered import Layered
from toolchain.registry import Registry

FAMILIES: Registry[Family] = Registry(
    "family",
    "slimvit.families",
    {
        "vit": "toolchain.families.vit:VIT",
        "eva": "toolchain.families.eva:EVA",
        "beit": "toolchain.families.beit:BEIT",
        "relpos": "toolchain.families.relpos:RELPOS",
        "naflex": "toolchain.families.naflex:NAFLEX",
        "swin": "toolchain.families.swin:SWIN",
        "swin-v2": "toolchain.families.swin:SWIN_V2",
    },
)


def adapt(model: nn.Module) -> None:
    """Puts a fresh timm model into the form that its family works on, in place; a model of no family stays as it is."""
    for family in FAMILIES.values():
        if family.matches(model):
            family.adapt(model)


def family_of(model: nn.Module, name: str) -> Family:
    """The family responsible for a model.

    Raises:
        ModelError: no family knows the model, or the family refuses it; the message says why.
    """
    if isinstance(model, Layered):
        return model.layered_family
    reasons = []
    for family in reversed([*FAMILIES.values()]):  # those of other packages first
        if family.matches(model):
            if (reason := family.refuses(model)) is None:
                return family
            reasons.append(reason)
    if reasons:
        raise ModelError(f"{name} is not supported: {reasons[-1]}. See `slimvit models` for what is.")
    raise ModelError(
        f"{name} is not supported: {type(model).__name__} belongs to no known family (known: {', '.join(FAMILIES)}). "
        "See `slimvit models` for what is."
    )


__all__ = [
    "FAMILIES",
    "AttentionSite",
    "Block",
    "Branch",
    "Bridge",
    "Factorizable",
    "Family",
    "Layered",
    "Parallel",
    "Pooling",
    "Span",
    "Step",
    "UnitGroup",
    "adapt",
    "family_of",
    "pre_norm",
]
