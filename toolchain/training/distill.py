"""The dense parent as a teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain.training.loop import Loss


def distillation(teacher: nn.Module, temperature: float = 2.0) -> Loss:
    """½·T²·KL(teacher ‖ student at temperature T) + ½·CE, the loss of Hinton et al. 2015 (arXiv 1503.02531).

    Args:
        teacher: images [B, C, H, W] → logits [B, K]; put into eval mode, never trained.
        temperature: T.
    """
    teacher.eval().requires_grad_(False)

    def loss(student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        teacher.to(images.device)
        with torch.no_grad():
            target = functional.log_softmax(teacher(images) / temperature, dim=1)
        logits = student(images)
        soft = functional.kl_div(
            functional.log_softmax(logits / temperature, dim=1), target, log_target=True, reduction="batchmean"
        )
        return 0.5 * temperature**2 * soft + 0.5 * functional.cross_entropy(logits, labels)

    return loss
