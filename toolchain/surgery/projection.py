"""Recognises heads that are no classifier: image towers as CLIP's project to the space shared with texts."""

from __future__ import annotations

from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from toolchain.plan import ModelRef

KIN, FINE_TUNED = ("clip", "pe_core"), "ft_in"
"""What stands in timm's names of such towers, and in the tags of those that were fine-tuned to classes."""


def projects(ref: ModelRef) -> bool:
    """Whether the head of a model is the projection of an image tower, as timm's own weights of that architecture have it.

    timm counts the width of the projection as classes. A tower with any other number of them has a classifier.
    """
    default = get_pretrained_cfg(ref.name)
    classes = ref.kwargs.get("num_classes", default.num_classes if default else 0)
    widths = {
        config.num_classes
        for name, config in get_arch_pretrained_cfgs(ref.name).items()
        if any(word in name for word in KIN) and FINE_TUNED not in name
    }
    return bool(classes) and classes in widths


def projection_note(ref: ModelRef) -> str:
    """The note on such a model."""
    return (
        f"The head of {ref.name} projects an image to the numbers that it shares with texts: they are its features, and no "
        "classes. model.kwargs.num_classes = 0 gives the vector before it; model.output = 'logits' says that they are classes."
    )
