"""Judges features without a classifier: by their error against the dense model's, and by k-NN on labelled images.

Legend: B, N images, * positions of tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from toolchain.data import Images
from toolchain.errors import ArtifactError, DataError
from toolchain.likelihood import Outputs, in_batches, parts_of
from toolchain.parity import ROUNDING, STILL
from toolchain.training.outcome import Features, Neighbours, Worst

K = 20
"""Number of neighbours that vote, if each class has as many; usual in self-supervised learning (DINO, arXiv 2104.14294)."""
BANK = 2048
"""The most training images whose neighbours are looked for; of more classes than that one image each."""
HELD = 2**24
"""The most numbers of the dense outputs that are kept for the next model; of more they are computed again each time."""
Model = Callable[[Tensor], Outputs]


class Sums:
    """What the figures of one output follow from, added up batch by batch in float64: no image is held.

    Attributes:
        count: images so far.
        wrong, spread: Σ‖y − y_dense‖² and Σ‖y_dense − mean‖² at each position, [P]; 1 of one vector.
        cosine: mean cosine over images at each position, [P].
    """

    def __init__(self) -> None:
        self.count, self._origin = 0, torch.empty(0)
        self._sum = self._squares = self.wrong = self._cosines = torch.zeros(1, dtype=torch.float64)

    def add(self, y: Tensor, known: Tensor) -> None:
        """A batch [B, *, D] of a model and of the dense one."""
        ours, theirs = (each.double().reshape(len(each), -1, each.shape[-1]) for each in (y, known))  # [B, P, D]
        if not self.count:
            self._origin = theirs[0]  # near the mean, so that little cancels
        moved = theirs - self._origin
        self.count += len(theirs)
        self._sum = self._sum + moved.sum(0)
        self._squares = self._squares + moved.square().sum((0, 2))
        self.wrong = self.wrong + (ours - theirs).square().sum((0, 2))
        self._cosines = self._cosines + functional.cosine_similarity(ours, theirs, dim=-1).sum(0)

    @property
    def spread(self) -> Tensor:
        return (self._squares - self._sum.square().sum(-1) / self.count).clamp(min=0)

    @property
    def cosine(self) -> Tensor:
        return self._cosines / self.count

    @property
    def error(self) -> float | None:
        """The relative error over all positions; None where the dense outputs do not vary."""
        spread = float(self.spread.sum())
        noise = ROUNDING**2 * self.count * float(self._origin.square().sum())  # as of images that are all the same
        return float(self.wrong.sum()) / spread if spread > noise else None

    @property
    def errors(self) -> Tensor:
        """The relative error at each position, of one that hardly varies against a tenth of the mean variation, [P]."""
        return self.wrong / self.spread.clamp(min=STILL * float(self.spread.mean()))


def sums_of(pairs: Iterable[tuple[Outputs, Outputs]]) -> list[Sums]:
    """One `Sums` for each output of (a model's, the dense model's) batches."""
    sums: list[Sums] = []
    for outputs, reference in pairs:
        parts = [*zip(parts_of(outputs), parts_of(reference), strict=True)]
        sums = sums or [Sums() for _ in parts]
        for each, pair in zip(sums, parts, strict=True):
            each.add(*pair)
    return sums


def _mean_error(sums: Sequence[Sums]) -> float | None:
    errors = [each.error for each in sums]
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if len(known) == len(errors) else None


def relative_error(outputs: Outputs, reference: Outputs) -> float | None:
    """Σ‖y − y_dense‖² / Σ‖y_dense − mean‖² of outputs [N, …]: 0 for the dense model, 1 for one that always gives its mean.

    Of several outputs the mean over them. None where the dense outputs do not vary, as those of a single image.
    """
    return _mean_error(sums_of([(outputs, reference)]))


def mean_cosine(sums: Sequence[Sums]) -> float:
    """The mean over images, positions and outputs of the cosine of a vector [D] with the dense one."""
    return sum(float(each.cosine.mean()) for each in sums) / len(sums)


def worst_of(sums: Sequence[Sums], names: Sequence[str] = ()) -> Worst:
    """The largest error and the smallest cosine of all positions and outputs; `names` are those of the outputs."""

    def at(number: int, position: int) -> str:
        name = (names[number] if names else f"output {number}") if len(sums) > 1 else ""
        place = f"position {position}" if len(sums[number].wrong) > 1 else ""
        return ", ".join(filter(None, (name, place)))

    errors = [(float(each.errors.max()), number, int(each.errors.argmax())) for number, each in enumerate(sums)]
    cosines = [(float(each.cosine.min()), number, int(each.cosine.argmin())) for number, each in enumerate(sums)]
    (error, *where), (cosine, *there) = max(errors), min(cosines)
    return Worst(error=error, error_at=at(*where), cosine=cosine, cosine_at=at(*there))


def pooled(outputs: Outputs) -> Tensor:
    """[B, D], one vector for each image: features as they are, of tokens the mean, of several layers that of the last."""
    last = parts_of(outputs)[-1]
    return last if last.ndim == 2 else last.flatten(1, -2).mean(1)


def voted(queries: Tensor, bank: Tensor, labels: Tensor, k: int = K) -> Tensor:
    """The label [B] that most of the k nearest have by cosine; of equally many, those that are nearer.

    Args:
        queries: [B, D].
        bank: [N, D], the vectors to search.
        labels: [N], theirs.
        k: how many vote; fewer than the bank has.
    """
    similar, nearest = (functional.normalize(queries, dim=1) @ functional.normalize(bank, dim=1).T).topk(k, dim=1)
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=torch.float64)
    # A share of a vote, in all less than one, decides between classes of as many
    votes.scatter_add_(1, labels[nearest], 1 + (similar.double() + 1) / (4 * k))
    return votes.argmax(1)


def bank_of(images: Images, most: int = BANK) -> tuple[Images, int]:
    """(labelled images to search, how many of them vote): as many of each class as there are, evenly over its images.

    Raises:
        DataError: as many as there are would vote, so that every image had the same neighbours.
    """
    labels = images.labels
    classes, counts = torch.unique(labels, return_counts=True)
    quota = max(1, most // len(classes))
    parts = []
    for label, count in zip(classes.tolist(), counts.tolist(), strict=True):
        taken = min(quota, count)
        parts.append((labels == label).nonzero().flatten()[torch.arange(taken) * count // taken])
    chosen, k = torch.cat(parts).sort().values, min(K, quota, int(counts.min()))
    if k >= len(chosen):
        raise DataError(
            f"{len(chosen)} labelled training images are too few to look for neighbours among; give images of two classes or more"
        )
    return images.take(chosen), k


@dataclass(frozen=True)
class FeatureJudge:
    """Judges models by their features, against those of one dense model.

    Attributes:
        dense: the model that is taken as right; None for no comparison.
        test: what features are compared on.
        bank: labelled images whose labels vote for those of `test`, which has labels too; None for no vote.
        names: what the outputs are called.
        held: the most numbers of the dense outputs that are kept.
    """

    dense: Model | None
    test: Images
    bank: Images | None = None
    names: tuple[str, ...] = ()
    held: int = HELD

    def __call__(self, model: Model, what: str = "the model") -> Features:
        """How near a model's features are to the dense ones, and how many test images it puts among their like.

        Raises:
            ArtifactError: some are NaN or infinite; `what` names the model.
            DataError: there are too few images to look for neighbours among.
        """
        knn = None
        if self.bank is not None:
            bank, k = bank_of(self.bank)
            right = self._right(model, what)
            knn = Neighbours(k=k, bank=len(bank), right=right, dense_right=self._dense_right, total=len(self.test))
        if self.dense is None:
            return Features(error=None, cosine=None, knn=knn)
        sums = sums_of(zip(self._finite(model, self.test, what), self._dense(), strict=True))
        error = _mean_error(sums)
        worst = None if error is None else worst_of(sums, self.names)
        return Features(error=error, cosine=mean_cosine(sums), worst=worst, images=len(self.test), knn=knn)

    @cached_property
    def _dense_right(self) -> int | None:
        return None if self.dense is None else self._right(self.dense, "the dense model")

    def _right(self, model: Model, what: str) -> int:
        """How many test images have the label that their neighbours in the bank vote for, by a model's features."""
        assert self.bank is not None
        bank, k = bank_of(self.bank)
        vectors, queries = (
            torch.cat([pooled(each).float() for each in self._finite(model, part, what)]) for part in (bank, self.test)
        )
        return int((voted(queries, vectors, bank.labels, k) == self.test.labels).sum())

    def _dense(self) -> Iterable[Outputs]:
        """The dense outputs for the test images, batch by batch."""
        assert self.dense is not None
        return self._held if self._held is not None else in_batches(self.dense, self.test)

    @cached_property
    def _held(self) -> list[Outputs] | None:
        """Those that are few enough to be kept."""
        assert self.dense is not None
        (first,) = in_batches(self.dense, self.test.take(torch.arange(1)))
        numbers = len(self.test) * sum(part.numel() for part in parts_of(first))
        return [*self._finite(self.dense, self.test, "the dense model")] if numbers <= self.held else None

    def _finite(self, model: Model, images: Images, what: str) -> Iterator[Outputs]:
        """A model's outputs batch by batch; ends in an ArtifactError where some were no numbers."""
        bad = 0
        for outputs in in_batches(model, images):
            finite = [part.isfinite().flatten(1).all(1) for part in parts_of(outputs)]
            bad += int((~torch.stack(finite).all(0)).sum())
            yield outputs
        if bad:
            raise ArtifactError(
                f"{what} gives NaN or infinity for {bad} of {len(images)} images, so that nothing can be said of its features"
            )
