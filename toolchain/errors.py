"""Every error a user can meet, with the exit code that it ends the command with."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Self

ADVICE: Mapping[int, str] = {
    errno.ENOENT: "name one that is there",
    errno.EACCES: "choose another place, or let this user in",
    errno.EPERM: "choose another place, or let this user in",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some, or choose another place",
    errno.EDQUOT: "free some, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "what stands before the last / must be a folder",
    errno.ELOOP: "name what the links lead to",
    errno.ENOEXEC: "install the one for this processor",
}
"""Fault of the system → what to do, to follow its own words."""


def fault_words(error: OSError) -> str:
    """What the system says of a fault, and what to do about it where that is known."""
    said = error.strerror or str(error)
    advice = ADVICE.get(error.errno or 0)
    return f"{said}; {advice}" if advice else said


def with_install(reason: str, install: str) -> str:
    """What is missing, and the line that would bring it, if there is one."""
    return f"{reason.removesuffix('.')}. Try: {install}" if install else reason


class SlimvitError(Exception):
    """Base of all errors that slimvit raises on purpose; the message is written for the user."""

    exit_code = 70


class RecipeError(SlimvitError):
    """The recipe, or a command-line option, says something that cannot be done."""

    exit_code = 2


class OutputsUnfit(RecipeError):
    """An artifact gives outputs by which it cannot be judged as it was asked for: labels in place of scores."""


class ModelError(RecipeError):
    """The model is unknown, unsupported, or does not fit the data."""


class DataError(RecipeError):
    """The data source is unknown, empty, or lacks what the recipe needs from it."""


class BudgetError(RecipeError):
    """No plan meets the budget; the message names the reachable range."""


class PlanError(RecipeError):
    """A compression plan contradicts itself or the model that it is applied to."""


class ArtifactError(SlimvitError):
    """A file is not what it claims to be: truncated, altered, of the wrong kind, or unsafe to load."""

    exit_code = 3


class ParityError(SlimvitError):
    """Two forms of one model that must agree do not."""

    exit_code = 3


class MeasurementError(SlimvitError):
    """A measurement is invalid, inconclusive, or a required speedup was not verified."""

    exit_code = 4


class Slowdown(SlimvitError):
    """The compressed model takes more time than the dense one, beyond the tolerance."""

    exit_code = 1


class TargetUnavailable(SlimvitError):
    """A target cannot be used on this machine.

    Attributes:
        reason: what is missing.
        install: the line that would bring it, or "" if none would.
    """

    exit_code = 5
    verdict = "is unavailable"

    def __init__(self, target: str, reason: str, install: str = "") -> None:
        self.target, self.reason, self.install = target, reason, install
        super().__init__(f"{self.opening(target)}{with_install(reason, install)}")

    @classmethod
    def opening(cls, target: str) -> str:
        """The words that the message about a target begins with."""
        return f"target {target!r} {cls.verdict}: "

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str]]:
        return type(self), (self.target, self.reason, self.install)


class WorkloadRefused(TargetUnavailable):
    """A target that is there cannot run a workload as it stands: with so many threads, on these cores, with this setting."""

    verdict = "cannot do this"


class DeviceLost(TargetUnavailable):
    """A target that had answered went away, or others held it for too long: nothing is known of what was to run there."""


class WorkerLost(TargetUnavailable):
    """A worker of a cluster went away with what it was carrying out."""


class BaselineError(SlimvitError):
    """The artifact that a gate compares with is not there, or is not the one that was named."""

    exit_code = 6


class StorageError(SlimvitError):
    """Reading or writing a file failed."""

    exit_code = 74


class FolderBusy(StorageError):
    """Another process is writing to a run's folder."""
