"""How good features are that no label can judge: their error against the dense model's, and what their neighbours know.

Legend: B, N images, * positions of tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional

from toolchain.data import Images
from toolchain.likelihood import Outputs, in_batches, joined, outputs_of, parts_of

K = 20
"""Neighbours that vote; the custom of self-supervised learning (DINO, Caron et al. 2021, arXiv 2104.14294)."""
BANK = 2048
"""The most training images whose neighbours are looked for."""
HELD = 2**24
"""The most numbers of one model's outputs that are held in memory to be compared: of many tokens those of fewer images."""
Model = Callable[[Tensor], Outputs]


class Neighbours(BaseModel):
    """k-NN by cosine: how many test images have the label that most of their nearest training images have.

    Attributes:
        k: how many of them vote.
        right: by the features that are judged.
        dense_right: by the dense model's; None where there is none to hold them against.
        total: test images.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    k: int
    right: int
    dense_right: int | None
    total: int


class Features(BaseModel):
    """Features on the test split: against the dense model's, where there is one, and by what their neighbours know.

    Attributes:
        error: E‖f_dense − f‖² / E‖f_dense − mean‖², of several layers the mean over them; None where the dense ones do not vary.
        cosine: mean cosine of a vector, or token, with the dense one.
        knn: None where the data has no labels.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    error: float | None
    cosine: float | None
    knn: Neighbours | None = None


def relative_error(outputs: Outputs, reference: Outputs) -> float | None:
    """Σ‖y − y_dense‖² / Σ‖y_dense − mean‖² of outputs [N, …]: 0 for the dense model, 1 for one that always gives its mean.

    Of several outputs the mean over them. None where the dense outputs do not vary, as those of a single image.
    """
    errors = []
    for y, known in zip(parts_of(outputs), parts_of(reference), strict=True):
        ours, theirs = y.double(), known.double()
        spread = float((theirs - theirs.mean(0)).square().sum())
        if spread <= 0:
            return None
        errors.append(float((ours - theirs).square().sum()) / spread)
    return sum(errors) / len(errors)


def mean_cosine(outputs: Outputs, reference: Outputs) -> float:
    """The mean over images, positions and outputs of the cosine of a vector [D] with the dense one."""
    pairs = zip(parts_of(outputs), parts_of(reference), strict=True)
    means = [float(functional.cosine_similarity(y.double(), known.double(), dim=-1).mean()) for y, known in pairs]
    return sum(means) / len(means)


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
        k: how many vote; all where the bank has fewer.
    """
    similar, nearest = (functional.normalize(queries, dim=1) @ functional.normalize(bank, dim=1).T).topk(
        min(k, len(bank)), dim=1
    )
    votes = torch.zeros(len(queries), int(labels.max()) + 1, dtype=torch.float64)
    # A share of a vote, in all less than one, decides between classes of as many
    votes.scatter_add_(1, labels[nearest], 1 + (similar.double() + 1) / (4 * k))
    return votes.argmax(1)


@dataclass(frozen=True)
class FeatureJudge:
    """Judges models by their features, against those of one dense model that is looked at once.

    Attributes:
        dense: the model that is taken as right; None for no comparison.
        test: what features are compared on.
        bank: labelled images whose labels vote for those of `test`, which has labels too; None for no vote.
    """

    dense: Model | None
    test: Images
    bank: Images | None = None

    def __call__(self, model: Model) -> Features:
        """How near a model's features are to the dense ones, and how many test images it puts among their like."""
        knn = None
        if self.bank is not None:
            right = neighbours_right(model, self.test, self.bank)
            knn = Neighbours(k=K, right=right, dense_right=self._dense_right, total=len(self.test))
        if self._dense is None:
            return Features(error=None, cosine=None, knn=knn)
        compared, theirs = self._dense
        ours = outputs_of(model, compared)
        return Features(error=relative_error(ours, theirs), cosine=mean_cosine(ours, theirs), knn=knn)

    @cached_property
    def _dense_right(self) -> int | None:
        if self.dense is None or self.bank is None:
            return None
        return neighbours_right(self.dense, self.test, self.bank)

    @cached_property
    def _dense(self) -> tuple[Images, Outputs] | None:
        """(the test images, or an even sample of as many as fit into memory, the dense outputs for them)."""
        if self.dense is None:
            return None
        numbers = sum(part.numel() for part in parts_of(outputs_of(self.dense, self.test.take(torch.arange(1)))))
        compared = self.test.spread(HELD // numbers)
        return compared, outputs_of(self.dense, compared)


def neighbours_right(model: Model, test: Images, bank: Images) -> int:
    """How many test images have the label that their neighbours among at most `BANK` others vote for, by a model's features."""
    known = bank.spread(BANK)
    vectors, queries = (joined([pooled(each) for each in in_batches(model, part)]) for part in (known, test))
    assert isinstance(vectors, Tensor)
    assert isinstance(queries, Tensor)
    return int((voted(queries.float(), vectors.float(), known.labels) == test.labels).sum())
