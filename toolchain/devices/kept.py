"""Sessions that were finished before a comparison was cut off, taken up by the next run of the same comparison."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from toolchain.devices.portable import Portable
from toolchain.devices.transport import Measurer
from toolchain.errors import ArtifactError, StorageError
from toolchain.files import digest_of, read_json, user_cache, write_text
from toolchain.on_device.runner import Samples, Schedule, schedule_digest
from toolchain.progress import Progress

log = logging.getLogger(__name__)
FOLDER = "sessions"
OPEN: set[str] = set()
"""Tokens of the KeptSessions open in this process. One never reuses sessions that another recorded."""
SAME_PROCESS_S = 5.0
"""How far a process's start time, in seconds, may seem to move when the system's clock is set."""
MAX_AGE_S = 24 * 3600
"""A kept session older than this, in seconds, is measured again: the machine may have changed."""


class KeptSessions:
    """A measurer that stores every finished session until its comparison is complete; a context manager.

    A kept session is reused only for the same schedule, the same artifacts (by content) and the same device. It is kept only if
    its comparison was cut off: an interruption or a full disk keeps all sessions of the block, a failed session keeps those of
    its comparison. Sessions of a comparison that finished are deleted, and the next run measures afresh.

    Args:
        measurer: runs the sessions that are not there.
        device: identifies where they run; sessions of one device are never reused for another.
    """

    def __init__(self, measurer: Measurer, device: str) -> None:
        self.measurer, self.device = measurer, device
        self._portable = Portable()
        self._used: dict[Path, str] = {}
        self._failed: set[str] = set()
        self._token = secrets.token_hex(8)

    def __enter__(self) -> Self:
        _forget_old()
        OPEN.add(self._token)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        OPEN.discard(self._token)
        lost = kind is not None and (issubclass(kind, StorageError) or not issubclass(kind, Exception))
        if lost:  # a result that could not be written counts as none
            return
        for path, of in self._used.items():
            if of not in self._failed:
                path.unlink(missing_ok=True)

    def run(self, schedule: Schedule, progress: Progress) -> Samples:
        """The session's result, from an earlier run if that was cut off; raises as `Measurer.run` does."""
        if "session" not in schedule:  # a cold start: each counts by itself
            return self.measurer.run(schedule, progress)
        portable = self._portable.of(schedule).schedule
        of = schedule_digest({key: value for key, value in portable.items() if key not in ("session", "blocks")})
        path = user_cache() / FOLDER / f"{digest_of(self.device, schedule_digest(portable))}.json"
        if path not in self._used and (samples := _take_up(path)) is not None:
            self._used[path] = of
            log.info("session %s on %s was finished by an earlier run", schedule["session"], self.device)
            progress.at(1.0, "finished by an earlier run")
            return samples
        try:
            result = self.measurer.run(schedule, progress)
        except BaseException:
            self._failed.add(of)
            raise
        try:
            write_text(
                path,
                json.dumps(
                    {"writer": os.getpid(), "began": _began(os.getpid()), "token": self._token, "result": result},
                    separators=(",", ":"),
                )
                + "\n",
            )
        except StorageError as error:  # the measurement itself goes on
            log.warning(
                "%s; were this comparison cut off, session %s would be measured again", error, schedule["session"]
            )
        else:
            self._used[path] = of
        return result


def _forget_old() -> None:
    """Removes sessions that no run can take up any more."""
    with contextlib.suppress(OSError):
        for path in (user_cache() / FOLDER).glob("*.json"):
            if time.time() - path.stat().st_mtime > MAX_AGE_S:
                path.unlink(missing_ok=True)


def _take_up(path: Path) -> Samples | None:
    """A kept session; None if there is none, it is too old, damaged, or of a run that is still under way."""
    try:
        if time.time() - path.stat().st_mtime > MAX_AGE_S:
            return None
        stored = read_json(path)
        result, writer, token = stored["result"], int(stored["writer"]), stored["token"]
    except (OSError, ArtifactError, StorageError, KeyError, TypeError, ValueError):
        return None
    if writer == os.getpid():
        running = token in OPEN
    else:  # numbers of processes come again
        began = _began(writer)
        running = began is not None and abs(began - float(stored.get("began") or 0.0)) < SAME_PROCESS_S
    return result if isinstance(result, dict) and not running else None


def _began(process: int) -> float | None:
    """When a process began, in seconds; None if there is none of that number."""
    try:
        return float(psutil.Process(process).create_time())
    except psutil.Error:
        return None
