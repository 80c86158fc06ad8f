"""Distillation losses with the dense model as the teacher, with labels or without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolchain.likelihood import Likelihood
from toolchain.training.loop import Loss
from toolchain.training.processes import unwrapped

TEMPERATURE = 2.0


def distillation(teacher: nn.Module, likelihood: Likelihood) -> Loss:
    """½·T²·KL(teacher ‖ student at temperature T = 2) + ½·CE, the loss of Hinton et al. 2015 (arXiv 1503.02531).

    Args:
        teacher: images [B, C, H, W] → outputs [B, K]; put into eval mode, never trained.
        likelihood: of the outputs.
    """
    target_of = _without_gradients(teacher)

    def loss(student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        target = target_of(images)
        outputs = student(images)
        soft = likelihood.divergence(outputs, target, TEMPERATURE).mean()
        return 0.5 * soft + 0.5 * likelihood.supervised(outputs, labels)

    return loss


def supervision(likelihood: Likelihood) -> Loss:
    """The mean negative log-likelihood of the labels: cross-entropy, or binary cross-entropy of a single logit."""

    def loss(student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return likelihood.supervised(student(images), labels)

    return loss


def imitation(
    teacher: nn.Module,
    likelihood: Likelihood,
    last_block: str,
    tokens: int | None = None,
    temperature: float = TEMPERATURE,
) -> Loss:
    """T²·KL(teacher ‖ student at temperature T) + MSE(LN(student), LN(teacher)); labels are not looked at.

    LN(x) = (x − mean) / √(variance + 1e-6) over the width D of each token of the residual stream x [B, N, D] after
    the last block: the model's own final norm without its scale and shift, whatever kind of norm that is. The MSE is
    the mean of the squared difference over images, tokens and width.

    Args:
        teacher: images [B, C, H, W] → outputs [B, K]; put into eval mode, never trained.
        likelihood: of the outputs.
        last_block: module path of the last block, of teacher and student alike; its output is [B, N, D].
        tokens: how many leading ones the head reads. They alone are compared: nothing depends on the others after the
            last block, and compression lets them go there. None for all.
        temperature: T.
    """
    target_of = _without_gradients(teacher)

    def loss(student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001 - that is the point
        with _output_of(teacher, last_block) as expected:
            target = target_of(images)
        with _output_of(unwrapped(student), last_block) as got:
            outputs = student(images)
        features = functional.mse_loss(_normalised(got[0][:, :tokens]), _normalised(expected[0][:, :tokens]))
        apart: Tensor = likelihood.divergence(outputs, target, temperature).mean() + features
        return apart

    return loss


def _without_gradients(teacher: nn.Module) -> Callable[[Tensor], Any]:
    """The teacher as a function from images to outputs, on the device of the images."""
    teacher.eval().requires_grad_(False)

    def target(images: Tensor) -> Any:
        teacher.to(images.device)
        with torch.no_grad():
            return teacher(images)

    return target


def _normalised(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


@contextmanager
def _output_of(model: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """A list that each call of a submodule adds its output to, until the block ends."""
    outputs: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
