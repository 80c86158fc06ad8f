"""Where stored tensors come from, what was made of them for a model, and the words of notes and refusals about them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from toolchain.errors import ArtifactError, SlimvitError
from toolchain.surgery.anatomy import Anatomy
from toolchain.surgery.resampling import TIMM, Resampling


@dataclass(frozen=True)
class Fitted:
    """Tensors under a model's names, positions and patches resampled to its sizes.

    Attributes:
        state: name → tensor; it may still lack some of the model's, or hold others.
        anatomy: of the tensors as they were stored.
        model: that of the model.
        adapted: fields of `Anatomy` in which they were made to fit: "positions", "patch_size".
        notes: one sentence for each thing that was changed.
    """

    state: dict[str, Tensor]
    anatomy: Anatomy
    model: Anatomy
    adapted: frozenset[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where tensors come from, and how they may be adapted.

    Attributes:
        what: how a message calls them, such as "the checkpoint m.pth".
        plural: whether that is a plural, as "the pretrained weights" is.
        made_for: (height, width) of the images that they were trained on, where that is known.
        resample_patches: whether the recipe allows another patch size.
        positions: how positions are brought to the model's grid.
        patches: how a patch embedding is brought to the model's size.
        may_differ: fields of `Anatomy` in which they may differ from the model: somebody else sees to those.
        beside: a clause on what lies beside them and was not taken; "" if nothing does.
        fault: what is raised if they do not fit: a file that is another's, or a recipe that asks for another model.
    """

    what: str
    plural: bool = False
    made_for: tuple[int, int] | None = None
    resample_patches: bool = False
    positions: Resampling = TIMM
    patches: Resampling = TIMM
    may_differ: frozenset[str] = frozenset()
    beside: str = ""
    fault: type[SlimvitError] = ArtifactError

    def word(self, singular: str) -> str:
        """A verb or a pronoun in the number of `what`, such as "has" or "have"."""
        return _PLURALS[singular] if self.plural else singular

    def misfit(self, why: str, do: str = "") -> SlimvitError:
        """The refusal of tensors that do not fit: why, what to do, and what lies beside them."""
        text = f"{self.what} {self.word('does')} not fit the model: {why}"
        return self.fault("; ".join(filter(None, (text, do, self.beside))))


_PLURALS = {"does": "do", "has": "have", "holds": "hold", "it": "they", "its": "their", "lacks": "lack", "was": "were"}


def some(names: Collection[str]) -> str:
    """How many names there are, and the first of them; a single one alone."""
    shown = list(names)[:2]
    if len(names) == 1:
        return shown[0]
    return f"{len(names)} tensors ({', '.join(shown)}{', …' if len(names) > 2 else ''})"


def left_out(names: Collection[str]) -> str:
    """A clause: that tensors were left out, by name."""
    return f"{some(names)} {'was' if len(names) == 1 else 'were'} left out"
