"""Images in batches, decoded ahead in threads.

Pillow and torch let other threads run while they decode and resize, so threads are as good as processes here, and need no
shared memory, of which a container has little.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from toolchain.data.splits import Images

Batch = tuple[Tensor, Tensor]
BATCHES_AHEAD = 2


class Batches:
    """(images [B, C, H, W], labels [B]) of a data set, one pass for each time it is iterated over.

    What comes out does not depend on the number of threads, and the global random state is left alone. What a thread
    raises is raised where its image was to come.
    """

    def __init__(
        self, images: Dataset[tuple[Tensor, int]], batch_size: int, order: Iterable[int] | None = None
    ) -> None:
        self._images, self._batch_size, self._order = images, batch_size, order

    def __len__(self) -> int:
        size = len(self._images if self._order is None else self._order)  # type: ignore[arg-type]  # torch: no __len__
        return math.ceil(size / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        images = self._images
        order = list(range(len(images)) if self._order is None else self._order)  # type: ignore[arg-type]
        if not isinstance(images, Images):
            for start in range(0, len(order), self._batch_size):
                yield tuple(default_collate([images[index] for index in order[start : start + self._batch_size]]))
            return
        decoded, labels = _decoded(images, order, BATCHES_AHEAD * self._batch_size), images.labels
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            yield images.finished(list(islice(decoded, len(part)))), labels[part]


def batches(images: Dataset[tuple[Tensor, int]], batch_size: int, order: Sampler[int] | None = None) -> Batches:
    """The batches of a data set, as they come or in the given order; raises DataError for what cannot be decoded."""
    return Batches(images, batch_size, order)


def _decoded(images: Images, order: Sequence[int], ahead: int) -> Iterator[Tensor]:
    """What `raw` gives of each image, in order; up to `ahead` of them are decoded before they are asked for."""
    if not images.workers:
        yield from map(images.raw, order)
        return
    pool = ThreadPoolExecutor(min(images.workers, len(order) or 1), thread_name_prefix="slimvit-decode")
    try:
        left = iter(order)
        pending: deque[Future[Tensor]] = deque(pool.submit(images.raw, index) for index in islice(left, ahead))
        while pending:
            raw = pending.popleft().result()
            pending.extend(pool.submit(images.raw, index) for index in islice(left, 1))
            yield raw
    finally:
        pool.shutdown(cancel_futures=True)
