"""The interface of a model family: which units can be removed, which linears can be factorised, and how its blocks run.

Masking, slicing, cost prediction, the closed form and export checks read nothing but these declarations, so a new timm
family is one object in `FAMILIES`. Legend: B images, D width of the residual stream, which may change between stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor, nn

Step = Callable[[nn.Module, Tensor], Tensor]
"""(model, residual stream [B, *, D]) → what is computed from it by the model's own modules."""


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
    """A module that computes softmax(q kᵀ) v, for counting MACs: H heads of head dim d.

    Attributes:
        module: its first input is [G, N, C], keys and values of all N.
        heads, head_dim: H and d of the values.
        queries: how many queries there are, where that is not N.
    """

    module: str
    heads: int
    head_dim: int
    queries: int | None = None


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block, which makes x + norm(γ · compute(model, x)) of the stream; module paths.

    Attributes:
        module: what its sites lie in.
        reader: the linear that `module` ends with; nothing but scale and norm, and what undoes `arrange`, comes after it.
        added: what gives the sum's second term, unchanged in eval mode: the stochastic depth.
        compute: what is added, before the scale.
        scale: path of the parameter γ [D], of a LayerScale or of the block itself; None where there is none.
        arrange: [B, *, c], laid out as what is added → [G, n, c] as linears of `module` are given it, in windows for
            instance, filled up with zeros; None where they are given it as it is.
        norm: path of a norm that stands between the reader and the sum; None in a block that has its norms before.
        apart: a part of `module` that is a branch of its own; None where there is none.
    """

    module: str
    reader: str
    added: str
    compute: Step
    scale: str | None = None
    arrange: Step | None = None
    norm: str | None = None
    apart: str | None = None

    def holds(self, path: str) -> bool:
        """Whether a module is the branch's, or lies in it."""
        inside = f"{path}.".startswith(f"{self.module}.")
        return inside and not (self.apart is not None and f"{path}.".startswith(f"{self.apart}."))

    def gives(self, model: nn.Module, x: Tensor) -> Tensor:
        """The output of the branch for a stream x, before a norm that follows."""
        y = self.compute(model, x)
        return y if self.scale is None else y * model.get_parameter(self.scale)

    def adds(self, model: nn.Module, y: Tensor) -> Tensor:
        """The term that is added to the stream if the branch computes y."""
        if self.norm is None:
            return y
        normed: Tensor = model.get_submodule(self.norm)(y)
        return normed

    def base(self, x: Tensor) -> Tensor:
        """The part of the stream to which the branch adds its output."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream after the branch, which adds y to the stream x."""
        return self.base(x) + y

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the branch adds to the stream."""
        return self.adds(model, self.gives(model, x))

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """The stream after the branch."""
        return self.after(x, self.run(model, x))

    def arranged(self, model: nn.Module, y: Tensor) -> Tensor:
        """y, given in the layout of the stream, rearranged as the linears of the branch take it."""
        return y if self.arrange is None else self.arrange(model, y)

    def asked(self, y: Tensor, their: Tensor, our: Tensor, beta: float) -> Tensor:
        """What the branch should give of the stream `our`: what the dense one gives of `their`, and β of the error between.

        Before a norm there is no such error to take up.
        """
        return y if self.norm is not None else y + beta * (self.base(their) - self.base(our))


@dataclass(frozen=True)
class Pooling(Branch):
    """A branch that takes the place of the stream: it reads N tokens and leaves `latents`, to which nothing was there to add."""

    latents: int = 1

    def base(self, x: Tensor) -> Tensor:
        """Zeros [B, latents, D]."""
        return x.new_zeros(len(x), self.latents, x.shape[-1])


@dataclass(frozen=True)
class Parallel(Branch):
    """One of several branches that read the same stream, and whose sum is added to it.

    Between two of them the stream [B, 2N, D] is what they all read, and behind it what it has become so far.

    Attributes:
        first, last: of those that read the same stream.
    """

    first: bool = True
    last: bool = True

    def base(self, x: Tensor) -> Tensor:
        """The stream as the branches before this one left it, [B, N, D]."""
        return x if self.first else x[:, x.shape[1] // 2 :]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream after the branch: what the next one reads stays in front."""
        total = super().after(x, y)
        return total if self.last else torch.cat((self._read(x), total), dim=1)

    def gives(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the branch computes of the stream that all of them read."""
        return super().gives(model, self._read(x))

    def _read(self, x: Tensor) -> Tensor:
        return x if self.first else x[:, : x.shape[1] // 2]


def pre_norm(norm: str | None, module: str, context: Callable[[nn.Module], Mapping[str, Tensor]] | None = None) -> Step:
    """The `compute` of module(norm(x)), with what `context` says that the module takes besides, by name; of module(x) alone.

    Args:
        norm, module: paths; None where nothing comes before the module.
        context: what the module takes besides, from the model.
    """

    def compute(model: nn.Module, x: Tensor) -> Tensor:
        more = {} if context is None else context(model)
        y: Tensor = model.get_submodule(module)(x if norm is None else model.get_submodule(norm)(x), **more)
        return y

    return compute


Bridge = Step
"""What is applied to the stream between two blocks, such as patch merging; nothing in it is compressed."""


@dataclass(frozen=True)
class Block:
    """One block: its path, its branches in forward order, and what joins the block before to it."""

    path: str
    branches: tuple[Branch, ...]
    bridge: Bridge | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of the stream through the block, in order."""
        return self.branches if self.bridge is None else (self.bridge, *self.branches)

    @property
    def pools(self) -> bool:
        """Whether the block replaces the tokens by pooled ones."""
        return any(isinstance(branch, Pooling) for branch in self.branches)

    def holds(self, path: str) -> bool:
        """Whether a module is the block, or lies in it."""
        return f"{path}.".startswith(f"{self.path}.")


class Family(ABC):
    """One timm model family.

    Attributes:
        name: in messages.
        timm_modules: the modules of `timm.models` that its models are in.
    """

    name: str
    timm_modules: Sequence[str]

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether this family is responsible for the model."""

    def refuses(self, model: nn.Module) -> str | None:  # noqa: ARG002
        """Why this model cannot be compressed at all, or None."""
        return None

    def adapt(self, model: nn.Module) -> None:  # noqa: B027
        """Makes a fresh timm model call each linear that it computes with, in place; it stays the same function."""

    @abstractmethod
    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        """(C, H, W) of the image that the model was built for, or that `at` says."""

    def at(self, size: tuple[int, int, int]) -> Family:  # noqa: ARG002
        """The family for images [C, H, W] = `size` of a model that takes others than it was built for.

        It is another one where blocks are told of the size from outside of the stream.
        """
        return self

    def patch_size(self, model: nn.Module) -> tuple[int, int] | None:  # noqa: ARG002
        """(rows, columns) of the patches that an image is cut into, where what they leave over is not seen; else None."""
        return None

    def convert_checkpoint(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:  # noqa: ARG002
        """A published checkpoint under timm's names, positions and patches resampled to the model's input size."""
        return dict(state)

    @abstractmethod
    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        """Every unit that can be removed, in forward order."""

    @abstractmethod
    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        """Every linear that can be factorised, in forward order."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[Block]:
        """Every block, in forward order: with the bridges between them all that the stream goes through."""

    def trunk(self, model: nn.Module) -> list[Block]:
        """The blocks before tokens are pooled."""
        return list(takewhile(lambda block: not block.pools, self.blocks(model)))

    def branches(self, model: nn.Module) -> list[Branch]:
        """The branches of all blocks, in forward order."""
        return [branch for block in self.blocks(model) for branch in block.branches]

    @abstractmethod
    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        """The model's output from the residual stream after the last block: logits [B, K], features [B, D] or tokens."""

    def readings(self, model: nn.Module) -> Mapping[str, Step]:
        """Path of a block → what makes the model's next output of the stream after it, in the order of the outputs."""
        return {self.blocks(model)[-1].path: self.head}

    def outputs(self, parts: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """What `readings` make, one after another, as the model itself gives it."""
        return parts[0]

    def tokens(self, model: nn.Module, x: Tensor) -> Tensor:
        """[B, *, D]: the residual stream after any block, through the model's last norm where that is as wide."""
        norm = model.get_submodule("norm")
        width = getattr(norm, "normalized_shape", x.shape[-1:])
        y: Tensor = norm(x) if tuple(width) == tuple(x.shape[-1:]) else x
        return y

    def classifier(self, model: nn.Module) -> str | None:  # noqa: ARG002
        """The one linear that ends in the logits; None if there is no such one, or no classifier."""
        return None

    def read_tokens(self, model: nn.Module) -> int | None:  # noqa: ARG002
        """How many leading tokens of the last block the head reads; None for all."""
        return None

    @abstractmethod
    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        """Every attention, in forward order."""

    def restrictions(self, model: nn.Module) -> list[str]:  # noqa: ARG002
        """What this family can do elsewhere but not on this model, one sentence each, for the user."""
        return []
