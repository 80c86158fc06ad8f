"""Infers the architecture of a vision transformer from names and shapes of its tensors, and compares two of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
EMBEDS = "embeds."
"""The prefix of what timm's NaFlexVit keeps together and its other vision transformers do not: patches, positions, tokens."""
TRANSFORMERS = "Hugging Face transformers"
MARKS: tuple[tuple[str, str], ...] = (
    (r"encoder\.layer\.\d+\.attention\.|(^|\.)layer\.\d+\.attention\.q_proj", TRANSFORMERS),
    (r"encoder\.layers\.\d+\.(self_attn\.q_proj|blocks\.\d+\.attention)\.", TRANSFORMERS),
    (r"encoder\.layers\.encoder_layer_\d+\.", "torchvision"),
    (r"(^|\.)layers\.\d+\.(ln1|attn\.attn)\.", "mmpretrain"),
    (r"lora_[AB]\.|base_layer\.", "an adapter (LoRA) beside its base model"),
    (r"(^|\.)layer\d+\.\d+\.(conv|bn)\d", "a ResNet"),
    (r"layers\.\d+\.blocks\.\d+\.", "a hierarchical transformer such as Swin"),
)
"""Patterns of tensor names that show which other library wrote them."""


@dataclass(frozen=True)
class Anatomy:
    """A vision transformer by the names and shapes of its tensors; None is what they do not say.

    Attributes:
        embed_dim: width D of the residual stream.
        depth: number of blocks.
        hidden: outputs of a block's first MLP linear.
        patch_size: (height, width) in pixels of the patch embedding's kernel.
        in_chans: channels that it reads.
        positions: rows of the position table, those of other tokens among them; 0 where there is no table.
        classes: rows of the classifier; 0 where there is none.
        class_token, distilled, reg_tokens: tokens before those of the patches.
        norm: the last norm: "norm" before pooling, "fc_norm" after it, "norm and fc_norm", or "none".
        embeds_tokens: whether the position table has rows for those tokens too; only where a model shows it.
        layer_scale, qkv_bias, qk_norm, attn_pool: whether there is one.
    """

    embed_dim: int | None = None
    depth: int | None = None
    hidden: int | None = None
    patch_size: tuple[int, int] | None = None
    in_chans: int | None = None
    positions: int | None = None
    classes: int | None = None
    class_token: bool | None = None
    distilled: bool | None = None
    reg_tokens: int | None = None
    embeds_tokens: bool | None = None
    norm: str | None = None
    layer_scale: bool | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    attn_pool: bool | None = None

    @property
    def prefix_tokens(self) -> int:
        """Tokens that are no patches."""
        return int(self.class_token or 0) + int(self.distilled or 0) + (self.reg_tokens or 0)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of patches, if the position table can only be that of a square image; None otherwise."""
        if not self.positions:
            return None
        sides = {math.isqrt(n) for n in (self.positions, self.positions - self.prefix_tokens) if n > 0 and is_square(n)}
        side = next(iter(sides)) if len(sides) == 1 else None
        return None if side is None else (side, side)

    def to_dict(self) -> dict[str, object]:
        """What is known, by name, for `inspect`; with the grid and image size of a square image."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.grid is not None:
            facts["grid"] = by(self.grid)
            if self.patch_size is not None:
                facts["img_size"] = by((self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]))
        if self.patch_size is not None:
            facts["patch_size"] = by(self.patch_size)
        return facts


def is_square(count: int) -> bool:
    """Whether a count of patches can be that of a square."""
    return math.isqrt(count) ** 2 == count


def by(size: Sequence[int]) -> str:
    """(height, width) as text."""
    return "×".join(map(str, size))


def anatomy(tensors: Mapping[str, Tensor]) -> Anatomy:
    """What tensors under timm's names say; nothing at all where there is neither a block nor a patch embedding."""
    shapes = {name.removeprefix(EMBEDS): tuple(tensor.shape) for name, tensor in tensors.items()}
    blocks = {int(found[1]) for name in shapes if (found := BLOCK.match(name))}
    kernel = shapes.get("patch_embed.proj.weight", ())
    if not blocks and not kernel:
        return Anatomy()

    def first(*names: str) -> tuple[int, ...]:
        return next((shapes[name] for name in names if len(shapes.get(name, ())) > 0), ())

    block = f"blocks.{min(blocks, default=0)}."
    inner = {name.removeprefix(block) for name in shapes if name.startswith(block)}
    norms = [name for name in ("norm", "fc_norm") if f"{name}.weight" in shapes]
    mlp = first(f"{block}mlp.fc1.weight", f"{block}mlp.fc1_g.weight", f"{block}mlp.w12.weight")
    positions = shapes.get("pos_embed", ())
    head, registers = first("head.weight", "head.fc.weight"), first("reg_token", "register_tokens", "storage_tokens")
    width = kernel or first(f"{block}norm1.weight") or mlp[1:]
    return Anatomy(
        embed_dim=width[0] if width else None,
        depth=max(blocks) + 1 if blocks else None,
        hidden=mlp[0] if mlp else None,
        patch_size=(kernel[2], kernel[3]) if len(kernel) == 4 else None,
        in_chans=kernel[1] if len(kernel) == 4 else None,
        positions=positions[1] if len(positions) == 3 else (None if positions else 0),
        classes=head[0] if len(head) == 2 else (None if "head.weight" in shapes else 0),
        class_token="cls_token" in shapes,
        distilled="dist_token" in shapes,
        reg_tokens=registers[1] if len(registers) == 3 else 0,
        norm=" and ".join(norms) or "none",
        layer_scale=any(re.fullmatch(r"ls1\.gamma|gamma_1|gamma1", name) for name in inner),
        qkv_bias=bool(inner & {"attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias"}),
        qk_norm="attn.q_norm.weight" in inner,
        attn_pool=any(name.startswith("attn_pool.") for name in shapes),
    )


def differences(stored: Anatomy, model: Anatomy, ignored: Collection[str] = ()) -> dict[str, str]:
    """Field → in what tensors and a model differ, such as "depth 3 (the model: 2)", the plainest first.

    Args:
        stored: of the tensors.
        model: of the model that they are to be loaded into.
        ignored: fields of `Anatomy` that do not count.
    """
    fields = _unequal(stored, model, ignored)
    texts = {
        name: f"{_WORDS[name]} {_value(one)} (the model: {_value(other)})" for name, (one, other) in fields.items()
    }
    if "classes" in texts and not stored.classes:
        texts["classes"] = f"no classifier (the model: {model.classes} classes)"
    return texts


def _unequal(stored: Anatomy, model: Anatomy, ignored: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Field → its two values, where both are known and differ."""
    pairs = {name: (getattr(stored, name), getattr(model, name)) for name in _WORDS if name not in ignored}
    return {name: (one, other) for name, (one, other) in pairs.items() if None not in (one, other) and one != other}


def remedy(
    stored: Anatomy, model: Anatomy, ignored: Collection[str] = (), keywords: Collection[str] | None = None
) -> str:
    """What to set so that a model is that of the tensors, as "set model.kwargs.depth = 3"; "" if no keyword would do.

    Args:
        stored: of the tensors.
        model: of the model that they are to be loaded into.
        ignored: fields of `Anatomy` that may stay as they are.
        keywords: those that the architecture knows; None for all.
    """
    fields = _unequal(stored, model, ignored)
    kwargs = {_SETTINGS[name]: _toml(one) for name, (one, _) in fields.items() if name in _SETTINGS}
    if "embeds_tokens" in fields:
        kwargs["no_embed_class"] = _toml(not stored.embeds_tokens)
    if keywords is not None and "num_reg_tokens" in keywords and "reg_tokens" in kwargs:
        kwargs["num_reg_tokens"] = kwargs.pop("reg_tokens")
    if "norm" in fields and {stored.norm, model.norm} == {"norm", "fc_norm"}:
        kwargs["global_pool"] = '"avg"' if stored.norm == "fc_norm" else '"token"'
    if "class_token" in fields and not stored.class_token:  # which timm refuses unless something else is pooled
        kwargs["global_pool"] = '"avg"'
        if stored.norm == "norm":
            kwargs["fc_norm"] = "false"
    if "attn_pool" in fields:
        kwargs["global_pool"] = '"map"' if stored.attn_pool else '"token"' if stored.class_token else '"avg"'
    if "hidden" in fields and stored.hidden and stored.embed_dim:
        ratio = stored.hidden / stored.embed_dim
        if not model.hidden or not model.embed_dim or ratio != model.hidden / model.embed_dim:
            kwargs["mlp_ratio"] = f"{ratio:.6g}"
    settings = []
    if "distilled" in fields:
        form = "its distilled form, such as" if stored.distilled else "a form that is not distilled, such as"
        example = "deit_tiny_distilled_patch16_224" if stored.distilled else "deit_tiny_patch16_224"
        settings.append(f"set model.name to {form} {example}")
    if texts := [f"model.kwargs.{k} = {v}" for k, v in kwargs.items() if keywords is None or k in keywords]:
        settings.append("set " + ", ".join(texts))
    if "embed_dim" in fields:
        settings.append("model.kwargs.num_heads to that of the training, which no tensor says")
    return " and ".join(settings)


_WORDS = {
    "embed_dim": "embed_dim",
    "depth": "depth",
    "hidden": "MLP width",
    "patch_size": "patch size",
    "in_chans": "input channels",
    "classes": "classes",
    "class_token": "class token",
    "distilled": "distillation token",
    "reg_tokens": "register tokens",
    "embeds_tokens": "positions of tokens before the patches",
    "norm": "last norm",
    "layer_scale": "LayerScale",
    "qkv_bias": "qkv bias",
    "qk_norm": "norm of q and k",
    "attn_pool": "attention pooling",
}
_SETTINGS = {
    **{name: name for name in ("embed_dim", "depth", "patch_size", "in_chans", "class_token", "reg_tokens")},
    **{name: name for name in ("qkv_bias", "qk_norm")},
    "classes": "num_classes",
}
"""Field of `Anatomy` → timm's keyword argument that sets it."""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return by(value) if isinstance(value, tuple) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else str(list(value))
    return str(value)


def others(names: Collection[str]) -> str:
    """The library that these tensor names come from, if it is known and not timm; "" otherwise."""
    return next((who for mark, who in MARKS if any(re.search(mark, name) for name in names)), "")
