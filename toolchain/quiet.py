"""Blocks in which a library says nothing about its own parts, which nobody here can mend."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(logger: str) -> Iterator[None]:
    """A block without warnings, without what Python writes to stderr, and without what a logger says.

    Args:
        logger: its name.
    """
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
