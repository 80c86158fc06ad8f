"""Opens a target by its name, built in or from targets.toml, for measuring."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from toolchain.devices.kept import KeptSessions
from toolchain.devices.ssh import SshTransport
from toolchain.devices.targets_toml import (
    BundleSettings,
    LocalSettings,
    NamedTarget,
    SshSettings,
    named_target,
)
from toolchain.devices.transport import LocalTransport, Measurer
from toolchain.errors import TargetUnavailable
from toolchain.targets import TargetInfo, get_target


@dataclass(frozen=True)
class Device:
    """A machine with a runtime on which artifacts are measured.

    Attributes:
        name: as the user says.
        runtime: the target that runs there.
        measurer: carries out schedules there; it may take up sessions that an earlier run left.
        fresh: one that measures everything itself, where `measurer` does not.
        threads, affinity: what is taken if no option says otherwise.
        is_here: whether it is this machine.
    """

    name: str
    runtime: str
    measurer: Measurer = field(default_factory=LocalTransport)
    fresh: Measurer | None = None
    threads: int = 1
    affinity: tuple[int, ...] | None = None
    is_here: bool = True

    @property
    def afresh(self) -> Device:
        """The same device, where nothing of an earlier run is taken up."""
        return replace(self, measurer=self.fresh or self.measurer, fresh=None)


def device_for(target: str | Device) -> Device:
    """A device as it is; the name of a built-in target as a device of this machine."""
    return target if isinstance(target, Device) else Device(target, target)


class Devices:
    """The targets that one command measures on, by name; a context manager.

    Sessions finished in its block outlive it if it is cut off, see `KeptSessions`: so a command enters it once, around
    all that it measures and writes.

    Args:
        file: targets.toml, if it is not where it is looked for.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._stack = ExitStack()
        self._open: dict[str, Device] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.__exit__(kind, value, trace)

    def settings(self, name: str) -> NamedTarget:
        """The settings of a name in targets.toml, or of a built-in target.

        Raises:
            StorageError: targets.toml cannot be read.
            RecipeError: it is wrong, or there is no such target.
        """
        return named_target(name, self._file)

    def get(self, name: str, settings: NamedTarget | None = None) -> Device:
        """The device of a name, the same one each time.

        Args:
            name: of the target.
            settings: what is known of it already; else they are looked up.

        Raises:
            TargetUnavailable: the target is reached by bundles alone.
            StorageError, RecipeError: as `settings`.
        """
        if name not in self._open:
            target = settings or self.settings(name)
            device = connect(name, target)
            kept = self._stack.enter_context(KeptSessions(device.measurer, _where(target)))
            self._open[name] = replace(device, measurer=kept, fresh=device.measurer)
        return self._open[name]

    def here(self, name: str, what: str) -> Device:
        """The device of a name if it is this machine; raises TargetUnavailable for another one, and as `get`.

        Args:
            name: of the target.
            what: is asked for, for the message: "a floor".
        """
        device = self.get(name)
        if not device.is_here:
            raise TargetUnavailable(
                name,
                f"{what} is only measured on the machine that slimvit runs on; name one of its targets with --target.",
            )
        return device


@contextmanager
def open_device(name: str, file: Path | None = None) -> Iterator[Device]:
    """The one device of a command; arguments and errors as `Devices`."""
    with Devices(file) as devices:
        yield devices.get(name)


def require_direct(name: str, settings: NamedTarget) -> None:
    """Raises TargetUnavailable for a target that is only reached by bundles."""
    if isinstance(settings, BundleSettings):
        fix = f"slimvit bench pack A B --target {name} -o bundle.tar"
        raise TargetUnavailable(name, "it is reached by bundle, not directly.", fix)


def connect(name: str, settings: NamedTarget) -> Device:
    """The device of a name, which measures everything afresh; raises TargetUnavailable for one that bundles alone reach."""
    require_direct(name, settings)
    is_here = isinstance(settings, LocalSettings)
    measurer = SshTransport(name, settings) if isinstance(settings, SshSettings) else LocalTransport()
    return Device(name, settings.runtime, measurer, None, settings.threads, settings.affinity, is_here)


def _where(settings: NamedTarget) -> str:
    """A text that is the same for the same device."""
    if isinstance(settings, SshSettings):
        return f"ssh {settings.model_dump_json(include={'host', 'user', 'port', 'ssh_config', 'python'})}"
    return f"local {platform.node()}"


def probe(name: str, settings: NamedTarget) -> TargetInfo:
    """What answers under a name of targets.toml; raises TargetUnavailable with what is missing."""
    if isinstance(settings, SshSettings):
        return SshTransport(name, settings).probe()
    if isinstance(settings, BundleSettings):
        return TargetInfo(name, settings.runtime, "", "whatever runs the bundle", {"transport": "bundle"})
    info = get_target(settings.runtime).probe()
    return TargetInfo(
        name, info.runtime, info.version, info.device, {**info.details, "transport": "local"}, info.install
    )
