"""Wraps a device's runner so that its failures become the project's own errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable
from toolchain.on_device.runner import Runner, Unavailable
from toolchain.quiet import quiet_unless_failed
from toolchain.targets.base import Arrays, Feeds


class Checked:
    """A runner of a file that takes some batches alone.

    Args:
        runner: the device's own.
        path: of the file.
        target: whose it is, for messages.
        runtime: its name and version, for messages.
    """

    def __init__(self, runner: Runner, path: Path, target: str, runtime: str) -> None:
        self._runner, self._path, self._target, self._runtime = runner, path, target, runtime

    def __enter__(self) -> Self:
        """Raises StorageError or ArtifactError for a file that is not there or cannot be loaded, TargetUnavailable for threads."""
        if not self._path.is_file():
            raise StorageError(f"there is no file {self._path}")
        try:
            with quiet_unless_failed():
                self._runner.__enter__()
        except Unavailable as error:
            raise TargetUnavailable(self._target, str(error)) from error
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self._runtime} cannot load {self._path}: {error}") from error
        return self

    def __exit__(self, *raised: object) -> None:
        self._runner.__exit__(*raised)

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array; raises RecipeError for feeds that the file does not take, ArtifactError where the runtime fails."""
        with self._explained():
            return self._runner.infer(feeds)

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each call in nanoseconds; raises as `infer`, and for a batch that is none of the file's."""
        with self._explained():
            return self._runner.time_ns(feeds, samples)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise RecipeError(f"{self._path}: {error}") from error
        except RuntimeError as error:
            raise ArtifactError(f"{self._runtime} cannot run {self._path}: {error}") from error
