"""Base of runners whose file is opened in a child process: start, error messages and end of the child."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

from toolchain.errors import TargetUnavailable, fault_words

PATIENCE_S = 10.0
"""Seconds that a child may take to end before it is killed."""


class ChildRunner(ABC):
    """A child that answers over its standard streams, from entry to exit; what it prints goes to a file.

    Attributes:
        target: whose runner it is, for messages.
    """

    target: str
    _process: subprocess.Popen[bytes] | None = None
    _log: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Raises what `_command` and `_opened` raise, TargetUnavailable where nothing can be started; the child is gone then."""
        command, environment = self._command()
        self._log = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up
        try:
            self._process = self._started(command, environment)
            self._opened()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def pid(self) -> int | None:
        """Of the child, None where there is none: what it takes is the session's, see `fingerprint` of the device's runner."""
        return None if self._process is None else self._process.pid

    @abstractmethod
    def _command(self) -> tuple[Sequence[str], Mapping[str, str] | None]:
        """What is started, and its environment where that is not the session's."""

    @abstractmethod
    def _opened(self) -> None:
        """Asks the child to open the file, and checks its answer."""

    def _started(self, command: Sequence[str], environment: Mapping[str, str] | None) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment
            )
        except OSError as error:
            raise TargetUnavailable(self.target, f"{command[0]} cannot be started: {fault_words(error)}") from error

    def _running(self) -> Any:
        """The child; raises RuntimeError where there is none."""
        if self._process is None:
            raise RuntimeError(f"{type(self).__name__} is used outside its `with` block")
        return self._process

    def _code(self) -> int | None:
        """The exit code of a child that is about to be gone; None where it stays."""
        try:
            return int(self._running().wait(PATIENCE_S))
        except subprocess.TimeoutExpired:
            return None

    def _printed(self) -> list[str]:
        """The lines that the child printed."""
        if self._log is None:
            return []
        self._log.seek(0)
        return self._log.read().decode(errors="replace").strip().splitlines()

    def _end(self) -> None:
        """Ends the child, by force where closing its streams does not."""
        process, self._process = self._process, None
        if process is not None:
            for stream in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what a child that died did not read
                    assert stream is not None
                    stream.close()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
