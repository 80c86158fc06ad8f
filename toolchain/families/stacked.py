"""Base of the families: a model is a stack of blocks, each declared as its branches with what is in them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from toolchain.families.base import AttentionSite, Block, Factorizable, Family, UnitGroup
from toolchain.families.blocks import Layer, Part, blocks, refused_mlp
from toolchain.families.narrow import narrow
from toolchain.families.pooling import POOL, latent_pool, pool_layers, refining_site, refused_output


class StackedFamily(Family):
    """A model of blocks, and maybe an attention pool behind them.

    Attributes:
        model_type: timm's class.
        block_types, block_words: its blocks that are supported, and what they are called in messages.
        attention_types, attention_words: likewise its attentions.
    """

    model_type: type[nn.Module]
    block_types: tuple[type[nn.Module], ...]
    attention_types: tuple[type[nn.Module], ...]
    block_words: str
    attention_words: str

    def __init__(self, size: tuple[int, int, int] | None = None) -> None:
        self.size = size  # of the images; None for that which a model was built for

    def at(self, size: tuple[int, int, int]) -> Family:
        return type(self)(size)

    @abstractmethod
    def layers(self, model: nn.Module, block: nn.Module, path: str, index: int) -> list[Layer]:
        """The branches of one block, and what is in each, in forward order."""

    def every_block(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(path, block), in forward order."""
        return blocks(model)

    def stages(self, model: nn.Module) -> Iterator[tuple[str, list[Layer]]]:
        """(path, branches and what is in each) of every block, and of the attention pool behind them."""
        for index, (path, block) in enumerate(self.every_block(model)):
            yield path, self.layers(model, block, path, index)
        if (pool := latent_pool(model)) is not None:
            yield POOL, pool_layers(pool)

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, self.model_type)

    def refuses(self, model: nn.Module) -> str | None:
        if not self.matches(model):
            return f"{type(model).__name__} is not a timm {self.model_type.__name__}"
        every = list(self.every_block(model))
        if not every:
            return "the model has no blocks"
        for path, block in every:
            if (why := self.refused_block(block, path)) is not None:
                return why
        return refused_output(model)

    def refused_block(self, block: nn.Module, path: str) -> str | None:
        """Why a block cannot be compressed, or None."""
        if type(block) not in self.block_types:
            return f"{path} is a {type(block).__name__}; only {self.block_words} supported"
        for name, part in block.named_modules():
            kind = name.rpartition(".")[2]
            if kind == "attn" and type(part) not in self.attention_types:
                return f"{path}.{name} is a {type(part).__name__}; only {self.attention_words} supported"
            if kind == "mlp" and (why := refused_mlp(part, f"{path}.{name}")) is not None:
                return why
        return None

    def adapt(self, model: nn.Module) -> None:
        narrow(model)

    def input_size(self, model: nn.Module) -> tuple[int, int, int]:
        return self.size or self.built_for(model)

    def built_for(self, model: nn.Module) -> tuple[int, int, int]:
        """(C, H, W) of the image that the model was built for."""
        patches = model.get_submodule("patch_embed")
        height, width = patches.img_size  # type: ignore[misc]
        first = next(each for each in patches.modules() if isinstance(each, nn.Conv2d))
        return first.in_channels, int(height), int(width)

    def patch_size(self, model: nn.Module) -> tuple[int, int] | None:
        patches = model.get_submodule("patch_embed")
        rows, columns = patches.patch_size  # type: ignore[misc]
        return None if getattr(patches, "dynamic_img_pad", False) else (int(rows), int(columns))

    def unit_groups(self, model: nn.Module) -> list[UnitGroup]:
        return [group for part in self._every(model) for group in part.groups]

    def factorizable(self, model: nn.Module) -> list[Factorizable]:
        return [item for part in self._every(model) for item in part.linears]

    def attentions(self, model: nn.Module) -> list[AttentionSite]:
        sites = [layer.site for _, layers in self.stages(model) for layer in layers if layer.site is not None]
        return [*sites, *refining_site(model)]

    def restrictions(self, model: nn.Module) -> list[str]:
        return list(dict.fromkeys(reason for part in self._every(model) for reason in part.restrictions))

    def _every(self, model: nn.Module) -> Iterator[Part]:
        return (layer.part() for _, layers in self.stages(model) for layer in layers)

    def blocks(self, model: nn.Module) -> list[Block]:
        return [Block(path, tuple(layer.branch for layer in layers)) for path, layers in self.stages(model)]

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        pool = latent_pool(model)
        if pool is None:
            outputs: Tensor = model.forward_head(model.get_submodule("norm")(x))  # type: ignore[operator]
            return outputs
        x = pool.pooled(x)  # what comes before is a block
        for name in ("fc_norm", "head_drop", "head"):
            x = model.get_submodule(name)(x)
        return x

    def classifier(self, model: nn.Module) -> str | None:
        return "head" if isinstance(model.get_submodule("head"), nn.Linear) else None

    def read_tokens(self, model: nn.Module) -> int | None:
        return 1 if model.global_pool == "token" else None
