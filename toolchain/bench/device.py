"""A target by its name, built in or of targets.toml, ready to be measured on."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from toolchain.bench.kept import KeptSessions
from toolchain.bench.ssh import SshTransport
from toolchain.bench.transport import LocalTransport, Transport
from toolchain.errors import TargetUnavailable
from toolchain.targets import TargetInfo, get_target
from toolchain.targets.named import BundleSettings, NamedTarget, SshSettings, named_target


@dataclass(frozen=True)
class Device:
    """Where `compare` is to measure.

    Attributes:
        name: as the user says.
        runtime: what `compare` calls its target.
        threads, affinity: what is taken if no option says otherwise.
        transport: for `compare`.
    """

    name: str
    runtime: str
    threads: int
    affinity: tuple[int, ...] | None
    transport: Transport


@contextmanager
def open_device(name: str, file: Path | None = None) -> Iterator[Device]:
    """The device of a name; sessions finished in the block outlive it if it is cut off, see `KeptSessions`.

    Args:
        name: a built-in target, or a name of targets.toml.
        file: that file, if it is not where it is looked for.

    Raises:
        StorageError: targets.toml cannot be read.
        RecipeError: it is wrong, or there is no such target.
        TargetUnavailable: the target is reached by bundles alone.
    """
    settings = named_target(name, file)
    if isinstance(settings, BundleSettings):
        raise TargetUnavailable(
            name, "it is reached by bundle, not directly.", f"slimvit bench pack A B --target {name} -o bundle.tar"
        )
    transport, where = _transport(name, settings)
    with KeptSessions(transport, where) as kept:
        yield Device(name, settings.runtime, settings.threads, settings.affinity, kept)


def _transport(name: str, settings: NamedTarget) -> tuple[Transport, str]:
    """(the transport, a text that is the same for the same device)."""
    if isinstance(settings, SshSettings):
        keys = ("host", "user", "port", "ssh_config", "python")
        return SshTransport(name, settings), f"ssh {settings.model_dump_json(include=set(keys))}"
    return LocalTransport(), f"local {platform.node()}"


def probe(name: str, settings: NamedTarget) -> TargetInfo:
    """What answers under a name of targets.toml; raises TargetUnavailable with what is missing."""
    if isinstance(settings, SshSettings):
        return SshTransport(name, settings).probe()
    if isinstance(settings, BundleSettings):
        return TargetInfo(name, settings.runtime, "", "whatever runs the bundle", {"transport": "bundle"})
    info = get_target(settings.runtime).probe()
    return TargetInfo(name, info.runtime, info.version, info.device, {**info.details, "transport": "local"})
