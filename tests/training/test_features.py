"""Figures of features: error and cosine against the dense ones, and votes of neighbours, counted by hand."""

from __future__ import annotations

import pytest
import torch

from toolchain.data import Images
from toolchain.training.features import (
    FeatureJudge,
    Neighbours,
    mean_cosine,
    neighbours_right,
    pooled,
    relative_error,
    voted,
)

EAST, NORTH, WEST = (torch.tensor(each, dtype=torch.float32) for each in ((1, 0), (0, 1), (-1, 0)))


def test_the_error_is_that_of_the_definition_for_any_rank_and_the_mean_over_outputs():
    y = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert relative_error(y, y) == 0
    assert relative_error(y.mean(0).expand(2, -1), y) == pytest.approx(1)
    assert relative_error(y[:1] + 1, y[:1]) is None
    assert relative_error(y, y[:1].expand(2, -1)) is None
    tokens = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    other = tokens + 0.1
    spread = (tokens - tokens.mean(0)).square().sum()
    assert relative_error(other, tokens) == pytest.approx(float(0.01 * tokens.numel() / spread), rel=1e-4)
    assert relative_error((y, other), (y, tokens)) == pytest.approx(0.5 * relative_error(other, tokens))


def test_the_cosine_is_of_each_vector():
    tokens = torch.stack([torch.stack([EAST, NORTH]), torch.stack([EAST, WEST])])
    assert mean_cosine(3 * tokens, tokens) == pytest.approx(1)
    assert mean_cosine(tokens * torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]]), tokens) == pytest.approx(0.5)


def test_one_vector_stands_for_an_image():
    vectors = torch.stack([EAST, WEST])
    tokens = torch.stack([torch.stack([EAST, NORTH]), torch.stack([WEST, NORTH])])
    assert torch.equal(pooled(vectors), vectors)
    assert torch.equal(pooled(tokens), tokens.mean(1))
    assert torch.equal(pooled(tokens.reshape(2, 1, 2, 2)), tokens.mean(1)), "[B, H, W, D], as Swin gives them"
    assert torch.equal(pooled((vectors, tokens)), tokens.mean(1)), "of layers the last"


def test_the_votes_are_those_of_the_k_nearest_by_cosine():
    bank = torch.stack([EAST, 9 * EAST, NORTH, NORTH, NORTH, WEST])
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    queries = torch.stack([EAST + 0.1 * NORTH, NORTH + 0.1 * WEST, 5 * WEST])
    assert voted(queries, bank, labels, k=1).tolist() == [0, 1, 2], "length means nothing"
    assert voted(queries, bank, labels, k=4).tolist() == [0, 1, 1]
    assert voted(queries, bank, labels, k=6).tolist() == [1, 1, 1], "the most frequent class of all"
    assert voted(queries, bank, labels, k=99).tolist() == [1, 1, 1]
    assert voted(queries[:1], bank[[2, 0]], torch.tensor([1, 0]), k=2).tolist() == [0], "of equal votes the nearer"


def planted(wrong, count=40):
    """Images of one pixel pair that are their own features; class 0 lies east, class 1 north, and `wrong` lie with the others."""
    labels = torch.arange(count) % 2
    vectors = torch.stack([EAST if (label == 0) != (index < wrong) else NORTH for index, label in enumerate(labels)])
    noise = 0.01 * torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    pixels = (vectors + noise).reshape(count, 2, 1, 1)
    return Images(lambda index: pixels[index], labels)


def flat(batch):
    return batch.flatten(1)


def test_what_neighbours_get_right_is_counted():
    bank, test = planted(0), planted(3, 30)
    assert neighbours_right(flat, test, bank) == 27
    judge = FeatureJudge(flat, test, bank)
    same = judge(flat)
    assert (same.error, same.cosine) == (0, pytest.approx(1))
    assert same.knn == Neighbours(k=20, right=27, dense_right=27, total=30)
    lost = judge(lambda batch: torch.ones(len(batch), 2))
    assert lost.error > 1
    assert lost.knn.right < 27 == lost.knn.dense_right


def test_without_labels_or_a_dense_model_the_other_figure_is_left():
    test = planted(0)
    assert FeatureJudge(flat, test)(flat).knn is None
    alone = FeatureJudge(None, test, planted(0))(flat)
    assert (alone.error, alone.cosine) == (None, None)
    assert alone.knn == Neighbours(k=20, right=40, dense_right=None, total=40)
