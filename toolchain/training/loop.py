"""The one training loop: deterministic, resumable at epoch boundaries, on `accelerate`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]  # re-exported, not in its __all__
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, Sampler

from toolchain.data import batches, read
from toolchain.errors import DataError, RecipeError
from toolchain.training import checkpoint as checkpoints

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: passes over the data.
        lr: the peak of the cosine, after a linear warm-up; it ends at 0.
        batch_size: images per step and process.
        weight_decay: of matrices; biases, norms and tokens have none.
        warmup_epochs: may be fractional.
        label_smoothing: of the default loss.
        shift_px: augmentation, each image moves by up to that many pixels, edges repeated.
        flip: augmentation, each image is mirrored with probability ½; only where the data source allows it.
        seed: of order, augmentation and drop path.
        ema_decay: the model becomes the moving average of its weights; None for none.
        grad_clip: the largest gradient norm.
    """

    epochs: int
    lr: float
    batch_size: int
    weight_decay: float = 0.05
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    shift_px: int = 0
    flip: bool = False
    seed: int = 0
    ema_decay: float | None = None
    grad_clip: float = 1.0


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step; counts start at 1, `loss` is the mean of the epoch so far."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    eta_s: float


@dataclass(frozen=True)
class FitResult:
    """What training did: the mean loss of each epoch, and its seconds.

    Seconds count all runs of an interrupted training, and no time in between.
    """

    losses: tuple[float, ...]
    seconds: float


def fit(
    model: nn.Module,
    train: Dataset[tuple[Tensor, int]],
    *,
    config: FitConfig,
    loss: Loss | None = None,
    param_groups: Callable[[nn.Module, FitConfig], list[dict[str, Any]]] | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    progress: Callable[[Progress], None] | None = None,
) -> FitResult:
    """Losses of training `model` in place.

    The same arguments give the same weights, bit for bit, on one machine and thread count, whether or not the run was
    killed and started again in between; the global random state is neither read nor changed.

    Args:
        model: its parameters that require a gradient are trained; its mode and device are restored at the end.
        train: (image float32 [C, H, W], label) pairs.
        config: how.
        loss: (model, images [B, C, H, W], labels [B]) → scalar; cross-entropy by default.
        param_groups: AdamW's groups; by default timm's, where only matrices decay.
        checkpoint: written after every epoch and resumed from; None for none.
        key: what else the outcome depends on (data, initial weights); a checkpoint of another key or config is ignored.
        progress: called after every step.

    Raises:
        DataError: there are no images.
        RecipeError: the loss is no longer finite.
        StorageError: the checkpoint cannot be written.
    """
    home, was_training = next(model.parameters()).device, model.training
    run = _Run(model, train, config, (param_groups or default_param_groups)(model, config))
    full_key = f"{key} {asdict(config)} x{run.accelerator.num_processes}"
    done = (checkpoints.load(checkpoint, full_key, run.modules, run.optimizer) if checkpoint else None) or {}
    losses: list[float] = done.get("losses", [])
    start = time.monotonic() - done.get("seconds", 0.0)
    if losses:
        logger.info("training resumes after epoch %d of %d", len(losses), config.epochs)
    for epoch in range(len(losses), config.epochs):
        with _own_randomness(_seed(config.seed, epoch, run.accelerator.process_index), run.accelerator.device) as draws:
            mean = run.epoch(epoch, loss or _cross_entropy(config.label_smoothing), draws, start, progress)
            if not math.isfinite(mean):
                raise RecipeError(
                    f"training diverged: the loss is {mean} in epoch {epoch + 1}; lower the lr (now {config.lr:g})"
                )
            losses.append(mean)
        if checkpoint is not None and run.accelerator.is_main_process:
            state = {"losses": losses, "seconds": time.monotonic() - start}
            checkpoints.save(checkpoint, full_key, state, run.modules, run.optimizer)
    if run.outcome is not model:
        model.load_state_dict(run.outcome.state_dict())
    model.to(home).train(was_training)
    return FitResult(tuple(losses), time.monotonic() - start)


class _Run:
    """A model, its data, optimiser and average, prepared by `accelerate` for wherever this runs.

    Attributes:
        modules: what a checkpoint holds besides the optimiser.
        outcome: the module that training would end with now: the average if there is one, else the model.
    """

    def __init__(
        self, model: nn.Module, train: Dataset[tuple[Tensor, int]], config: FitConfig, groups: list[dict[str, Any]]
    ) -> None:
        size = len(train)  # type: ignore[arg-type]  # torch leaves __len__ out of Dataset
        if size == 0:
            raise DataError("there are no images to train on")
        self.model, self.config = model, config
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._order = _EpochOrder(size, config.seed)
        self._wrapped, self.optimizer, self._loader = self.accelerator.prepare(
            model,
            torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay),
            batches(train, config.batch_size, self._order),
        )
        self._schedule = _cosine(self.optimizer, config, len(self._loader))
        self._ema = None
        self.modules, self.outcome = {"model": model}, model
        if config.ema_decay is not None:
            self._ema = ModelEmaV3(model, config.ema_decay, use_warmup=True, exclude_buffers=True)
            self.outcome = self.modules["ema"] = self._ema.module

    def epoch(
        self,
        epoch: int,
        loss: Loss,
        draws: torch.Generator,
        start: float,
        progress: Callable[[Progress], None] | None,
    ) -> float:
        """The mean loss per image of one pass over the data, over all processes."""
        self.model.train()
        self._order.epoch = epoch
        steps, epochs, device = len(self._loader), self.config.epochs, self.accelerator.device
        total, images_seen = torch.zeros((), device=device), torch.zeros((), device=device)
        for step, (images, labels) in enumerate(read(self._loader), epoch * steps):
            self._schedule.step_update(step)
            value = loss(self._wrapped, augment(images, self.config, draws), labels)
            self.optimizer.zero_grad()
            self.accelerator.backward(value)
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
            if self._ema is not None:
                self._ema.update(self.model, step=step + 1)
            total += value.detach() * len(images)
            images_seen += len(images)
            if progress is not None:
                eta_s = (time.monotonic() - start) / (step + 1) * (epochs * steps - step - 1)
                mean = float(total / images_seen)
                progress(Progress(epoch + 1, epochs, step - epoch * steps + 1, steps, mean, eta_s))
        return float(self.accelerator.reduce(total) / self.accelerator.reduce(images_seen))


def default_param_groups(model: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """AdamW's groups: weight decay on matrices, none on biases, norms, scales and what the model itself names."""
    excluded: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups: list[dict[str, Any]] = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=excluded)
    return groups


def augment(images: Tensor, config: FitConfig, generator: torch.Generator) -> Tensor:
    """The images [B, C, H, W], each shifted and mirrored by its own draw; the generator lives on the CPU."""
    batch, channels, height, width = images.shape
    device, shift = images.device, config.shift_px
    if config.flip:
        mirrored = torch.rand(batch, generator=generator).lt(0.5).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if shift:
        top, left = torch.randint(0, 2 * shift + 1, (2, batch, 1), generator=generator).to(device)
        rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
        padded = functional.pad(images, [shift] * 4, mode="replicate")
        each, channel = torch.arange(batch, device=device), torch.arange(channels, device=device)
        images = padded[
            each[:, None, None, None], channel[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
    return images


class _EpochOrder(Sampler[int]):
    """The indices of a data set in an order that depends on (seed, epoch) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch, 0))
        return iter(torch.randperm(self.size, generator=generator).tolist())


def _seed(seed: int, epoch: int, process: int) -> int:
    return (seed * 1_000_003 + epoch) * 1_009 + process


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A generator for augmentation; inside, the global one (drop path) is seeded too, and restored after."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)


def _cross_entropy(label_smoothing: float) -> Loss:
    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

    return loss


def _cosine(optimizer: torch.optim.Optimizer, config: FitConfig, steps: int) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to 0, as a function of the step alone, so that there is no state to save."""
    warmup = min(round(config.warmup_epochs * steps), config.epochs * steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, config.epochs * steps - warmup),
        warmup_t=warmup,
        warmup_lr_init=config.lr * 1e-2,
        warmup_prefix=True,
        t_in_epochs=False,
    )
