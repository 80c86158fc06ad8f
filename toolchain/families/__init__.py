"""Model families: a new one is a new file here and one entry in `FAMILIES`."""

from __future__ import annotations

from torch import nn

from toolchain.errors import ModelError
from toolchain.families.base import AttentionSite, Branch, Factorizable, Family, Span, UnitGroup
from toolchain.families.eva import EvaFamily
from toolchain.families.vit import VitFamily

FAMILIES: tuple[Family, ...] = (VitFamily(), EvaFamily())


def adapt(model: nn.Module) -> None:
    """Puts a fresh timm model into the form that its family works on, in place; a model of no family stays as it is."""
    for family in FAMILIES:
        if family.matches(model):
            family.adapt(model)


def family_of(model: nn.Module, name: str) -> Family:
    """The family responsible for a model.

    Raises:
        ModelError: no family knows the model, or the family refuses it; the message says why.
    """
    for family in FAMILIES:
        if family.matches(model):
            if (reason := family.refuses(model)) is not None:
                raise ModelError(f"{name} is not supported: {reason}. See `slimvit models` for what is.")
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ModelError(
        f"{name} is not supported: {type(model).__name__} belongs to no known family (known: {known}). "
        "See `slimvit models` for what is."
    )


__all__ = ["FAMILIES", "AttentionSite", "Branch", "Factorizable", "Family", "Span", "UnitGroup", "adapt", "family_of"]
