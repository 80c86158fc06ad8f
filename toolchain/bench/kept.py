"""Sessions that were finished before a comparison was cut off, taken up by the next run of the same comparison."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from toolchain.artifact import digest_of, read_json, write_text
from toolchain.bench.portable import Portable
from toolchain.bench.transport import Transport
from toolchain.cache import user_cache
from toolchain.errors import ArtifactError, StorageError
from toolchain.targets.device_runner import plan_digest

log = logging.getLogger(__name__)
FOLDER = "sessions"
MAX_AGE_S = 24 * 3600
"""A machine of yesterday is another one; an older session is measured again."""


class KeptSessions:
    """A transport that stores every finished session until its comparison is complete; a context manager.

    A session counts for one plan, the very artifacts (by content) and one device. Sessions are only taken up from a run
    that was cut off: what ends well, or ends in a judgement, is forgotten, and the next run measures afresh.

    Args:
        transport: where the sessions run.
        device: what the transport leads to; sessions of one device never count for another.
    """

    def __init__(self, transport: Transport, device: str) -> None:
        self.transport, self.device = transport, device
        self._portable = Portable()
        self._used: list[Path] = []
        self._cut_off = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = kind is not None and (issubclass(kind, StorageError) or not issubclass(kind, Exception))
        if self._cut_off or lost:  # a result that could not be written counts as none
            return
        for path in self._used:
            path.unlink(missing_ok=True)

    def run(self, plan: Mapping[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:
        """The session's result, from an earlier run if that was cut off; raises as `Transport.run` does."""
        if "session" not in plan:  # a cold start: each counts by itself
            return self.transport.run(plan, on_progress)
        key = digest_of(self.device, plan_digest(self._portable.of(plan).plan))
        path = user_cache() / FOLDER / f"{key}.json"
        if path not in self._used and (found := _take_up(path)) is not None:
            self._used.append(path)
            log.info("session %s on %s was finished by an earlier run", plan["session"], self.device)
            on_progress(1.0, "finished by an earlier run")
            return found
        try:
            result = self.transport.run(plan, on_progress)
        except BaseException:
            self._cut_off = True
            raise
        try:
            write_text(path, json.dumps({"writer": os.getpid(), "result": result}, separators=(",", ":")) + "\n")
        except StorageError as error:  # the measurement itself goes on
            log.warning("%s; were this comparison cut off, session %s would be measured again", error, plan["session"])
        else:
            self._used.append(path)
        return result


def _take_up(path: Path) -> dict[str, Any] | None:
    """A kept session; None if there is none, it is too old, damaged, or of a run that is still under way."""
    try:
        if time.time() - path.stat().st_mtime > MAX_AGE_S:
            return None
        stored = read_json(path)
        result, writer = stored["result"], int(stored["writer"])
    except (OSError, ArtifactError, StorageError, KeyError, TypeError, ValueError):
        return None
    running = writer != os.getpid() and psutil.pid_exists(writer)
    return result if isinstance(result, dict) and not running else None
