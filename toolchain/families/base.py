"""What a model family declares: which units can be removed, and which linears can be factorised.

Masking, slicing, cost prediction and export checks read nothing but these declarations, so a new timm family is one
new file with one `Family` in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Span:
    """Where the partitions of a unit lie along one axis of one linear.

    Partition `p` is `offset + p*width … offset + (p+1)*width - 1`.

    Attributes:
        linear: module path of an `nn.Linear`, weight [out, in].
        axis: 0 for the outputs (rows of the weight and the bias), 1 for the inputs (columns).
        offset: first position of partition 0.
        width: positions per partition; equals the unit's `total`.
        role: what the positions are in attention: "query", "key", "value" or "output"; "" elsewhere.
    """

    linear: str
    axis: int
    offset: int
    width: int
    role: str = ""


@dataclass(frozen=True)
class UnitGroup:
    """Positions that only make sense together: removing one removes it from every span.

    Attributes:
        module: module path that the unit belongs to, and whose attributes change with it.
        unit: name of the kind of unit ("mlp_hidden", "head_dim", …).
        total: positions per partition.
        partitions: number of partitions (heads for "head_dim", otherwise 1).
        spans: every place where the positions live.
        equal_per_partition: each partition must keep the same number of positions.
        sliceable: stock modules can lose the positions physically; if False they are only ever zeroed.
        attrs: attribute of `module` → its value as a function of the positions kept per partition.
        rescale_on_slice: those of `spans` whose kept rows are multiplied by √(kept/total) when sliced, because the
            smaller module's own attention scale is kept^−½ where the dense one's is total^−½.
        mixable: whether the positions of a partition may be rotated into one another; False where something acts on
            each alone.
    """

    module: str
    unit: str
    total: int
    spans: tuple[Span, ...]
    partitions: int = 1
    equal_per_partition: bool = True
    sliceable: bool = True
    attrs: Mapping[str, Callable[[int], float]] = field(default_factory=dict)
    rescale_on_slice: tuple[Span, ...] = ()
    mixable: bool = True


@dataclass(frozen=True)
class Factorizable:
    """A linear that may be replaced by a low-rank product.

    Attributes:
        linear: module path.
        kind: "attention" or "mlp".
        ends_branch: whether what it computes is what the branch adds to the residual stream.
    """

    linear: str
    kind: str
    ends_branch: bool = False


@dataclass(frozen=True)
class AttentionSite:
    """A module that computes softmax(q kᵀ) v, for counting MACs: H heads of head dim d."""

    module: str
    heads: int
    head_dim: int


def _nothing(_model: nn.Module) -> Mapping[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block: x + γ · module(norm(x)); module paths.

    Attributes:
        norm, module: what runs first, and next.
        reader: the linear that `module` ends with.
        added: what gives the sum's second term, unchanged in eval mode: the stochastic depth.
        scale: path of the parameter γ [D], of a LayerScale or of the block itself; None where there is none.
        context: the model → what `module` takes besides x, by name: position embeddings that act within attention.
    """

    norm: str
    module: str
    reader: str
    added: str
    scale: str | None = None
    context: Callable[[nn.Module], Mapping[str, Tensor]] = _nothing


class Family(Protocol):
    """One timm model family."""

    name: str
    timm_modules: Sequence[str]

    def matches(self, model: nn.Module) -> bool:
        """Whether this family is responsible for the model."""
        ...

    def refuses(self, model: nn.Module) -> str | None:
        """Why this model cannot be compressed at all, or None."""
        ...

    def adapt(self, model: nn.Module) -> None:
        """Makes a fresh timm model call each linear that it computes with, in place; it stays the same function."""
        ...

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """(C, H, W) of the image that the model was built for."""
        ...

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """A published checkpoint under timm's names, positions and patches resampled to the model's input size."""
        ...

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        """Every unit that can be removed, in forward order."""
        ...

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        """Every linear that can be factorised, in forward order."""
        ...

    def branches(self, model: nn.Module) -> dict[str, tuple[Branch, ...]]:
        """Block path → its residual branches, both in forward order."""
        ...

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [B, K] from the residual stream [B, N, D] after the last block."""
        ...

    def classifier(self, model: nn.Module) -> str | None:
        """The one linear that ends in the logits; None if there is no such one."""
        ...

    def read_tokens(self, model: nn.Module) -> int | None:
        """How many leading tokens of the last block the head reads; None for all."""
        ...

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        """Every attention, in forward order."""
        ...

    def limits(self, model: nn.Module) -> list[str]:
        """What this family can do elsewhere but not on this model, one sentence each, for the user."""
        ...
