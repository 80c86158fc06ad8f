import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from toolchain.errors import RecipeError
from toolchain.training.shares import EpochOrder, Share, augment


@given(st.integers(1, 70), st.integers(1, 8), st.integers(1, 6), st.integers(0, 3))
def test_shares_together_are_the_batches_of_one_process(size, local, processes, epoch):
    batch_size = local * processes
    orders = [EpochOrder(size, 5, batch_size, process, processes) for process in range(processes)]
    for order in orders:
        order.epoch = epoch
    read = [list(order) for order in orders]
    assert [len(order) for order in orders] == [len(indices) for indices in read]
    alone = EpochOrder(size, 5, batch_size)
    alone.epoch = epoch
    whole = list(alone)
    assert sorted(whole) == list(range(size))
    for step, shares in enumerate(zip(*(order.shares() for order in orders), strict=True)):
        joined = []
        for share, indices in zip(shares, read, strict=True):
            batch = indices[step * local : (step + 1) * local]  # as a loader with batches of `local` cuts them
            assert len(batch) == share.images.stop - share.images.start >= 1
            joined += batch[: share.stop - share.start]
        assert joined == whole[step * batch_size : (step + 1) * batch_size]
        assert sum(share.weight for share in shares) == pytest.approx(1)
        counts = [share.stop - share.start for share in shares]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(("batch_size", "processes", "near"), [(30, 4, "28 or 32"), (3, 4, "4")])
def test_a_batch_that_cannot_be_shared_is_refused(batch_size, processes, near):
    with pytest.raises(RecipeError, match=rf"batch_size {batch_size} .* {processes} processes .* to {near}$"):
        EpochOrder(100, 0, batch_size, 0, processes)


@pytest.mark.parametrize("total", [1, 5, 12])
@pytest.mark.parametrize("processes", [2, 3])
def test_an_image_is_augmented_alike_in_every_share(total, processes):
    images = torch.rand(total, 2, 6, 5)
    whole = augment(images, torch.Generator().manual_seed(7), shift_px=2, flip=True)
    for process in range(processes):
        share = Share.of(process, processes, total)
        generator = torch.Generator().manual_seed(7)
        own = augment(images[share.images], generator, shift_px=2, flip=True, share=share)
        assert own.equal(whole[share.images])
        after = torch.Generator().manual_seed(7)
        augment(images, after, shift_px=2, flip=True)
        assert generator.get_state().equal(after.get_state()), "the next batch is drawn alike, too"


def test_augmentation_shifts_and_mirrors_each_image_by_itself():
    images = torch.rand(40, 2, 6, 5)
    out = augment(images, torch.Generator().manual_seed(0), shift_px=1, flip=True)
    padded = nn.functional.pad(images, [1] * 4, mode="replicate")
    found = set()
    for index in range(40):
        for top, left, flip in itertools.product(range(3), range(3), (False, True)):
            source = (
                nn.functional.pad(images[index : index + 1].flip(-1), [1] * 4, mode="replicate")[0]
                if flip
                else padded[index]
            )
            if source[:, top : top + 6, left : left + 5].equal(out[index]):
                found.add((index, top, left, flip))
    assert {index for index, *_ in found} == set(range(40))
    assert len({draw[1:] for draw in found}) > 10
    assert augment(images, torch.Generator()).equal(images)
