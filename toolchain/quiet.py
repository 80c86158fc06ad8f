"""Context managers that silence a library's messages about its own internals, which a user cannot mend."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator

log = logging.getLogger(__name__)


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


@contextlib.contextmanager
def quiet_unless_failed() -> Iterator[None]:
    """What a library writes to stderr, Python's or the process's, is logged: as a warning where the block raises, else as information.

    Not for a process that another one listens to: where a library aborts, what it said is lost with the block.
    """
    sys.stderr.flush()
    kept, level = os.dup(2), logging.WARNING
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        os.dup2(said.fileno(), 2)
        try:
            with contextlib.redirect_stderr(said):
                yield
            level = logging.INFO
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            if words := said.read().strip():
                log.log(level, "%s", words)
