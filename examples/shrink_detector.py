"""Makes the backbone of a detector smaller, in place, and exports the detector as before.

The detector here is small and untrained, so that this file runs anywhere in seconds. With your own, three lines change: how
the model is made, what the images are, and the path of the backbone in it.

    python examples/shrink_detector.py detector.onnx
"""

from __future__ import annotations

import sys

import timm
import torch
from torch import Tensor, nn

import toolchain


class Detector(nn.Module):
    """Class scores and boxes for every patch, from the tokens after two blocks of a Vision Transformer."""

    def __init__(self, classes: int = 20) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"body": timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=64, depth=4)}
        )
        self.scores = nn.Conv2d(2 * 192, classes, 1)
        self.boxes = nn.Conv2d(2 * 192, 4, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, classes, h, w] and boxes [B, 4, h, w] of images [B, 3, H, W]."""
        maps = self.backbone["body"].forward_intermediates(images, indices=[1, 3], intermediates_only=True)
        features = torch.cat(maps, dim=1)
        return self.scores(features), self.boxes(features)


def main(path: str) -> None:
    """Shrinks the backbone to half of its parameters and writes the whole detector to an ONNX file."""
    torch.manual_seed(0)
    detector = Detector().eval()
    images = torch.randn(64, 3, 64, 64).split(16)  # a few hundred of yours, as your DataLoader gives them
    before = sum(p.numel() for p in detector.parameters())

    detector, plan = toolchain.shrink(detector, images, params=0.5, at="backbone.body")

    after = sum(p.numel() for p in detector.parameters())
    print(f"{before:,} parameters before, {after:,} after; {len(plan.keeps)} decisions, digest {plan.digest[:12]}")
    torch.onnx.export(detector, (images[0][:1],), path, dynamo=True, input_names=["image"], verbose=False)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "detector.onnx")
