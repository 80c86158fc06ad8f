"""What another package would hold: a model of two stages, its family, a criterion, a factorisation, a precision.

The first stage attends within windows of a grid, the second, after a merge of patches, over all of its tokens.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import TensorProto
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models import register_model
from torch import Tensor, nn

from toolchain.compress.criteria import Criterion, Evidence, Scores
from toolchain.compress.factorisations import Factorisation
from toolchain.export.conversion import Conversion
from toolchain.export.half import fp16
from toolchain.export.precision import AROUND_LINEARS, Precision
from toolchain.families import AttentionSite, Block, Branch, Factorizable, Family, UnitGroup, pre_norm
from toolchain.families.blocks import fused_part, mlp_groups
from toolchain.parity import Tolerance
from toolchain.surgery.factorised import FactorisedLinear

WINDOW = 2


def windows(x: Tensor) -> Tensor:
    """[B, 4, 4, c] → [4 B, 4, c]."""
    side = x.shape[1] // WINDOW
    parts = x.reshape(-1, side, WINDOW, side, WINDOW, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(-1, WINDOW * WINDOW, x.shape[-1])


def grid(y: Tensor, side: int) -> Tensor:
    """The inverse of `windows`."""
    parts = y.reshape(-1, side, side, WINDOW, WINDOW, y.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(-1, side * WINDOW, side * WINDOW, y.shape[-1])


class ToyBlock(nn.Module):
    def __init__(self, width: int, heads: int, *, windowed: bool) -> None:
        super().__init__()
        self.windowed = windowed
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, qkv_bias=True)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, 4 * width)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def attend(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        return grid(self.attn(windows(y)), x.shape[1] // WINDOW) if self.windowed else self.attn(y)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attend(x))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Merge(nn.Module):
    """[B, 4, 4, D] → [B, 4, 2 D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        merged = windows(x).reshape(-1, (x.shape[1] // WINDOW) ** 2, 4 * x.shape[-1])
        return self.reduction(self.norm(merged))


class ToyNet(nn.Module):
    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(1, width, 2, 2)
        self.layers = nn.ModuleList([ToyBlock(width, 2, windowed=True), ToyBlock(2 * width, 4, windowed=False)])
        self.merge = Merge(width)
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, num_classes)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean(1))

    def forward(self, image: Tensor) -> Tensor:
        x = self.layers[0](self.stem(image).permute(0, 2, 3, 1))
        return self.forward_head(self.layers[1](self.merge(x)))


@register_model
def toy_two_stages(*, num_classes: int = 10, width: int = 32, **_: object) -> ToyNet:
    return ToyNet(num_classes, width)


class ToyFamily(Family):
    name = "toy"
    timm_modules = ("toy_plugin",)

    def matches(self, model):
        return isinstance(model, ToyNet)

    def input_size(self, model):
        return (1, 8, 8)

    def unit_groups(self, model) -> list[UnitGroup]:
        groups: list[UnitGroup] = []
        for index, layer in enumerate(model.layers):
            groups += fused_part(layer.attn, f"layers.{index}.attn").groups
            groups += mlp_groups(layer.mlp, f"layers.{index}.mlp")
        return groups

    def factorizable(self, model):
        ends = {"attn.qkv": False, "attn.proj": True, "mlp.fc1": False, "mlp.fc2": True}
        names = [(f"layers.{index}.{name}", name) for index in range(2) for name in ends]
        return [
            Factorizable(path, "attention" if name.startswith("attn") else "mlp", ends[name]) for path, name in names
        ]

    def blocks(self, model):
        return [
            Block("layers.0", self._branches(0, lambda _model, y: windows(y))),
            Block("layers.1", self._branches(1, None), lambda model, x: model.merge(x)),
        ]

    def _branches(self, index, arrange):
        at = f"layers.{index}"
        return (
            Branch(
                f"{at}.attn",
                f"{at}.attn.proj",
                f"{at}.drop_path1",
                lambda model, x: model.layers[index].attend(x),
                arrange=arrange,
            ),
            Branch(f"{at}.mlp", f"{at}.mlp.fc2", f"{at}.drop_path2", pre_norm(f"{at}.norm2", f"{at}.mlp")),
        )

    def head(self, model, x):
        return model.forward_head(x)

    def classifier(self, model):
        return "head"

    def attentions(self, model):
        return [
            AttentionSite(f"layers.{index}.attn", layer.attn.num_heads, layer.attn.head_dim)
            for index, layer in enumerate(model.layers)
        ]


FAMILY = ToyFamily()


def _first(known: Evidence) -> Scores:
    """The first neurons are the best."""
    return {(g.module, g.unit): -torch.arange(g.total, dtype=torch.float64) for g in known.groups}


FIRST = Criterion("first", _first)


@torch.no_grad()
def _cut(linear: nn.Linear, rank: int) -> FactorisedLinear:
    """The first rows of the orthonormal factor; exact at full rank."""
    q, r = torch.linalg.qr(linear.weight.double())
    pair = FactorisedLinear.like(linear, rank)
    pair.up.weight.copy_(q[:, :rank])
    pair.down.weight.copy_(r[:rank])
    if linear.bias is not None:
        pair.up.bias.copy_(linear.bias)
    return pair


CUT = Factorisation("cut", _cut)


def _half(model: onnx.ModelProto, images: np.ndarray) -> Conversion:
    """Half the bits, as slimvit's own."""
    return fp16(model, images)


HALF = Precision(
    "fp16-ours",
    _half,
    Tolerance(None, 0.9999, 0.97),
    frozenset({TensorProto.FLOAT16}),
    product="HALF",
    operators=AROUND_LINEARS | {"Identity"},
)
