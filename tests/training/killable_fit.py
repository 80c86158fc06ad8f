"""A small, deterministic training that can be run as a process and killed: `python killable_fit.py CHECKPOINT`.

It prints a digest of what it ended with. Drop path, augmentation, EMA and a mask that two linears share are all on.
"""

import hashlib
import sys
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

from toolchain.data.splits import Images
from toolchain.training.loop import FitConfig, fit

EPOCHS = 4
CONFIG = FitConfig(EPOCHS, 3e-3, 8, warmup_epochs=1, label_smoothing=0.1, shift_px=1, flip=True, seed=3, ema_decay=0.9)


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=8,
            patch_size=4,
            in_chans=1,
            num_classes=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            drop_path_rate=0.2,
        )
    mask = (torch.arange(32) % 4 > 0).float()
    for block in model.blocks:
        for linear in (block.attn.qkv, block.mlp.fc1):
            parametrize.register_parametrization(linear, "weight", Mask(mask))
    return model


def make_data(size=60):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (size,), generator=generator)
    pixels = torch.randn(size, 1, 8, 8, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):  # the bright quadrant is the class
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 3
    return Images(pixels.__getitem__, labels)


def digest(model):
    state = model.state_dict()
    return hashlib.sha256(
        b"".join(name.encode() + value.numpy().tobytes() for name, value in state.items())
    ).hexdigest()


def train(checkpoint, pause_s=0.0, **options):
    """(digest of the weights, result) of the training, with a pause after every step."""
    torch.manual_seed(time.time_ns() % 2**31)  # nothing may depend on the global random state
    model = make_model()
    options = {"config": replace(CONFIG), "key": "data", "on_step": lambda _: time.sleep(pause_s)} | options
    result = fit(model, make_data(), checkpoint=checkpoint, **options)
    return digest(model), result


if __name__ == "__main__":
    weights, result = train(Path(sys.argv[1]), pause_s=0.02)
    print(weights, [loss.hex() for loss in result.losses])  # noqa: T201
