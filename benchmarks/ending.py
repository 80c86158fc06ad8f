"""A benchmark that is asked to end (SIGTERM) ends as by Ctrl-C: the processes that it started end with it."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def with_children() -> Iterator[None]:
    """While the block runs, SIGTERM raises SystemExit: `subprocess.run`, and what slimvit measures with, then end their process."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
