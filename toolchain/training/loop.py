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
from torch.utils.data import Dataset

from toolchain.data import batches
from toolchain.errors import DataError, RecipeError, StorageError
from toolchain.progress import Progress
from toolchain.training import checkpoint as checkpoints
from toolchain.training.processes import accelerator
from toolchain.training.shares import EpochOrder, augment, seed_of

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


ParamGroup = dict[str, Any]
"""What torch's optimisers take: parameters under "params", and their options."""


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: passes over the data.
        lr: the peak of the cosine, after a linear warm-up; it ends at 0.
        batch_size: images per step, over all processes together.
        weight_decay: of matrices; biases, norms and tokens have none.
        warmup_epochs: may be fractional.
        label_smoothing: of the default loss.
        shift_px: augmentation, each image moves by up to that many pixels, edges repeated.
        flip: augmentation, each image is mirrored with probability ½; only where the data source allows it.
        seed: of order, augmentation and drop path.
        ema_decay: the model becomes the moving average of its weights; None for none.
        grad_clip: the largest gradient norm.
        drop: whether the model's own dropout and drop path act; False trains it in eval mode.
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
    drop: bool = True


@dataclass(frozen=True)
class Step:
    """Where training stands after a step; counts start at 1.

    `loss` is the mean of the epoch so far, `batch_loss` that of this step, each over the images of all processes.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    batch_loss: float

    def tell(self, progress: Progress) -> None:
        """Says how far training is."""
        share = ((self.epoch - 1) + self.step / self.steps) / self.epochs
        progress.at(share, f"epoch {self.epoch}/{self.epochs}, loss {self.loss:.3f}")


def fit(
    model: nn.Module,
    train: Dataset[tuple[Tensor, int]],
    *,
    config: FitConfig,
    loss: Loss | None = None,
    param_groups: Callable[[nn.Module, FitConfig], list[ParamGroup]] | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    on_step: Callable[[Step], None] | None = None,
) -> checkpoints.Done:
    """Losses of training `model` in place.

    The same arguments give the same weights, bit for bit, on one machine and thread count, whether or not the run was
    killed and started again in between; the global random state is neither read nor changed.

    Processes that `torchrun` started must all call this with the same arguments. They share every batch and end with the same weights.
    These differ from those of one process by rounding alone, unless the model drops something (`drop`): what a process
    drops is its own draw. The main process writes the checkpoint, and all read it.

    Args:
        model: its parameters that require a gradient are trained; its mode and device are restored at the end.
        train: (image float32 [C, H, W], label) pairs.
        config: how.
        loss: (model, images [B, C, H, W], labels [B]) → scalar, a mean over the images; cross-entropy by default.
            With several processes the model is wrapped: the loss must call it, and may look into it by `unwrapped`.
        param_groups: AdamW's groups; by default timm's, where only matrices decay.
        checkpoint: written after every epoch and resumed from; None for none.
        key: what else the outcome depends on (data, initial weights); a checkpoint of another key or config is ignored.
        on_step: called after every step.

    Raises:
        DataError: there are no images.
        RecipeError: the loss is no longer finite, or the batch is no multiple of the number of processes.
        StorageError: the checkpoint cannot be written, or the processes do not read the same one.
    """
    home, was_training = next(model.parameters()).device, model.training
    run = _Run(model, train, config, (param_groups or default_param_groups)(model, config))
    full_key = f"{key} {asdict(config)} x{run.accelerator.num_processes}"
    done = (
        checkpoints.load(checkpoint, full_key, run.modules, run.optimizer) if checkpoint else None
    ) or checkpoints.Done()
    losses = done.losses
    run.require_same_epoch(len(losses), checkpoint)
    start = time.monotonic() - done.seconds
    if losses:
        logger.info("training resumes after epoch %d of %d", len(losses), config.epochs)
    for epoch in range(len(losses), config.epochs):
        with _own_randomness(config.seed, epoch, run.accelerator) as draws:
            mean = run.epoch(epoch, loss or _cross_entropy(config.label_smoothing), draws, on_step)
            if not math.isfinite(mean):
                peaks = sorted({group["initial_lr"] for group in run.optimizer.param_groups})
                raise RecipeError(
                    f"training diverged: the loss is {mean} in epoch {epoch + 1}; lower the lr (now "
                    f"{' and '.join(f'{peak:g}' for peak in peaks)})"
                )
            losses.append(mean)
        if checkpoint is not None and run.accelerator.is_main_process:
            state = checkpoints.Done(losses=losses, seconds=time.monotonic() - start)
            checkpoints.save(checkpoint, full_key, state, run.modules, run.optimizer)
    if run.outcome is not model:
        model.load_state_dict(run.outcome.state_dict())
    model.to(home).train(was_training)
    return checkpoints.Done(losses=losses, seconds=time.monotonic() - start)


class _Run:
    """A model, its data, optimiser and average, prepared by `accelerate` for wherever this runs.

    Attributes:
        modules: what a checkpoint holds besides the optimiser.
        outcome: the module that training would end with now: the average if there is one, else the model.
    """

    def __init__(
        self, model: nn.Module, train: Dataset[tuple[Tensor, int]], config: FitConfig, groups: list[ParamGroup]
    ) -> None:
        size = len(train)  # type: ignore[arg-type]  # torch leaves __len__ out of Dataset
        if size == 0:
            raise DataError("there are no images to train on")
        self.model, self.config = model, config
        self.accelerator = accelerator()
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        self._order = EpochOrder(size, config.seed, config.batch_size, process, processes)
        self._loader = batches(train, self._order.local, self._order)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self._wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
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
        on_step: Callable[[Step], None] | None,
    ) -> float:
        """The mean loss per image of one pass over the data, over all processes."""
        self.model.train(self.config.drop)
        self._order.epoch = epoch
        shares = self._order.shares()
        config, steps, epochs, device = self.config, len(shares), self.config.epochs, self.accelerator.device
        total, images_seen = torch.zeros((), device=device), 0
        for step, ((images, labels), share) in enumerate(zip(self._loader, shares, strict=True), epoch * steps):
            self._schedule.step_update(step)
            seen = augment(images.to(device), draws, shift_px=config.shift_px, flip=config.flip, share=share)
            value = loss(self._wrapped, seen, labels.to(device)) * share.weight
            self.optimizer.zero_grad()
            # What processes compute is averaged, and the weights of their shares sum to 1.
            self.accelerator.backward(value * self.accelerator.num_processes)
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.grad_clip)
            self.optimizer.step()
            if self._ema is not None:
                self._ema.update(self.model, step=step + 1)
            batch_loss = self.accelerator.reduce(value.detach(), "sum")
            total += batch_loss * share.total
            images_seen += share.total
            if on_step is not None:
                mean, done = float(total / images_seen), step - epoch * steps + 1
                on_step(Step(epoch + 1, epochs, done, steps, mean, float(batch_loss)))
        return float(total / images_seen)

    def require_same_epoch(self, epochs: int, checkpoint: Path | None) -> None:
        """Raises StorageError if the processes have done different numbers of epochs: they would wait for ever."""
        done = self.accelerator.gather(torch.tensor([epochs], device=self.accelerator.device)).tolist()
        if len(set(done)) > 1:
            raise StorageError(
                f"the processes read different checkpoints {checkpoint} (epochs done: {done}); put it where all nodes "
                "see it, or delete it"
            )


def default_param_groups(model: nn.Module, config: FitConfig) -> list[ParamGroup]:
    """AdamW's groups: weight decay on matrices, none on biases, norms, scales and what the model itself names."""
    excluded: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups: list[ParamGroup] = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=excluded)
    return groups


@contextmanager
def _own_randomness(seed: int, epoch: int, run: Accelerator) -> Iterator[torch.Generator]:
    """A generator for augmentation, alike in all processes; inside, the global one (drop path) is this process's own."""
    with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, epoch, run.process_index))
        yield torch.Generator().manual_seed(seed_of(seed, epoch))


def _cross_entropy(label_smoothing: float) -> Loss:
    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(model(images), labels, label_smoothing=label_smoothing)

    return loss


def _cosine(optimizer: torch.optim.Optimizer, config: FitConfig, steps: int) -> CosineLRScheduler:
    """Linear warm-up, then a cosine to 0, as a function of the step alone, so that there is no state to save."""
    warmup = min(round(config.warmup_epochs * steps), config.epochs * steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, config.epochs * steps - warmup),  # of a single step the first; timm warns of 1
        warmup_t=warmup,
        warmup_lr_init=config.lr * 1e-2,
        warmup_prefix=True,
        t_in_epochs=False,
    )
