"""Batches: the same whoever decodes them, ahead of time in threads, and without shared memory."""

import multiprocessing
import os
import threading
import time

import pytest
import torch
from torch.utils.data import TensorDataset

from toolchain.data import batches
from toolchain.data.splits import Images
from toolchain.errors import DataError


def numbers(count, workers, load=None, finish=None):
    load = load or (lambda position: torch.full((1, 1, 1), float(position)))
    return Images(load, list(range(count)), workers=workers, finish=finish)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_do_not_depend_on_who_decodes_them(workers):
    def load(position):
        time.sleep(0.002 * (position % 3))  # so that threads finish in another order
        return torch.full((1, 1, 1), position, dtype=torch.uint8)

    data = numbers(10, workers, load, finish=lambda raw: raw.float() / 2).take(torch.arange(9))
    before = torch.random.get_rng_state()
    loader = batches(data, 4)
    for _ in range(2):  # one pass for each time
        parts = [((2 * batch).flatten().tolist(), labels.tolist()) for batch, labels in loader]
        assert parts == [([0, 1, 2, 3],) * 2, ([4, 5, 6, 7],) * 2, ([8], [8])]
    assert len(loader) == 3
    assert torch.random.get_rng_state().equal(before)
    ordered = batches(data, 2, [8, 1, 5])
    assert [labels.tolist() for _, labels in ordered] == [[8, 1], [5]]
    assert len(ordered) == 2
    assert list(batches(data.take(torch.arange(0)), 9)) == []


def test_any_data_set_can_be_read_in_batches():
    data = TensorDataset(torch.arange(3.0), torch.arange(3))
    assert [(a.tolist(), b.tolist()) for a, b in batches(data, 2)] == [([0.0, 1.0], [0, 1]), ([2.0], [2])]


def test_decoding_needs_no_other_process():
    """Kind: little shared memory, as in a container. Decoded images never pass from one process to another."""
    places = set()

    def load(position):
        places.add((os.getpid(), threading.current_thread().name))
        return torch.zeros(1, 1, 1)

    list(batches(numbers(32, 2, load), 4))
    assert {pid for pid, _ in places} == {os.getpid()}
    assert not any(name == threading.current_thread().name for _, name in places)
    assert multiprocessing.active_children() == []


def test_images_are_decoded_while_a_batch_is_worked_on_and_not_too_far_ahead():
    decoded = []

    def load(position):
        decoded.append(position)
        return torch.zeros(1, 1, 1)

    reading = iter(batches(numbers(100, 2, load), 5))
    next(reading)
    deadline = time.monotonic() + 10
    while len(decoded) < 15 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert 5 < len(decoded) <= 15
    reading.close()  # leaves the rest
    assert len(decoded) <= 15
    assert not any(thread.name.startswith("slimvit-decode") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_decoded_is_said_in_one_line(workers):
    def load(position):
        raise DataError(f"cannot read the image {position}: not an image. Remove it.")

    with pytest.raises(DataError) as caught:
        list(batches(numbers(4, workers, load), 1))
    assert str(caught.value) == "cannot read the image 0: not an image. Remove it."
