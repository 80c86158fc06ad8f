"""What training and judging found, as reports tell it; nothing here loads torch."""

from __future__ import annotations

from typing import Literal

from toolchain.records import Record


class Neighbours(Record):
    """k-NN by cosine: how many test images have the label that most of their nearest training images have.

    Attributes:
        k: how many of them vote: 20, or as many as the smallest class has in the bank.
        bank: training images that were searched, as many of each class as there are.
        right: by the features that are judged.
        dense_right: by the dense model's; None where there is none to hold them against.
        total: test images.
    """

    k: int
    bank: int = 0
    right: int
    dense_right: int | None
    total: int


class Worst(Record):
    """Where features are furthest from the dense ones: a mean over outputs and positions averages a dead one away.

    Attributes:
        error: the largest over outputs and positions of tokens.
        error_at: where that is: "layer_2, position 0"; "" where there is one vector.
        cosine: the smallest mean over images, likewise.
        cosine_at: where that is.
    """

    error: float
    error_at: str = ""
    cosine: float
    cosine_at: str = ""


class Features(Record):
    """Features on the test split: against the dense model's, where there is one, and by what their neighbours know.

    Attributes:
        error: E‖f_dense − f‖² / E‖f_dense − mean‖², of several layers the mean over them; None where the dense ones do not vary.
        cosine: mean cosine of a vector, or token, with the dense one.
        worst: both where they are worst; None where `error` is.
        images: test images that were compared; None where there is nothing to compare with.
        knn: None where the data has no labels.
    """

    error: float | None
    cosine: float | None
    worst: Worst | None = None
    images: int | None = None
    knn: Neighbours | None = None


class FinetuneFacts(Record):
    """What fine-tuning learned from, how validation judged it, and which model it kept.

    Attributes:
        data: what it trained on.
        loss: name of the loss.
        judged_by: what `before` and `after` count: wrong validation images, or the divergence from the teacher.
        images: of validation.
        before, after: of the model that was given and of the trained one; None where it is not a number.
        kept: which of the two is the outcome.
    """

    data: dict[str, str]
    loss: str
    judged_by: Literal["errors", "divergence"]
    images: int
    before: float | int | None
    after: float | int | None
    kept: Literal["before", "after"]
