"""Sessions on a device that OpenSSH reaches: files go there once, by digest; samples come back over the connection.

The user's own client, configuration and keys are used; nothing is asked, and nothing is stored but the files named by
their digests. A session's process ends with the connection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from toolchain.devices.portable import Portable, PortableSchedule
from toolchain.devices.targets_toml import SshSettings
from toolchain.devices.transport import follow, how_it_died
from toolchain.errors import (
    ArtifactError,
    DeviceLost,
    MeasurementError,
    StorageError,
    TargetUnavailable,
    WorkloadRefused,
)
from toolchain.files import sha256
from toolchain.on_device import runner as device_runner
from toolchain.on_device import store as device_store
from toolchain.on_device.runner import MODULES, Samples, Schedule
from toolchain.progress import SILENT, Nobody, Progress
from toolchain.targets import TargetInfo

log = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)
OPTIONS = {
    "BatchMode": "yes",
    "ClearAllForwardings": "yes",
    "ConnectTimeout": "15",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "ServerAliveCountMax": "3",
    "ServerAliveInterval": "5",
}
# Runs the program that follows on standard input, N bytes long, without the current folder among its modules.
BOOT = """import sys
if sys.version_info < (3, 8):
    sys.exit("Python " + sys.version.split()[0] + " is too old, 3.8 or newer is needed")
sys.path[:] = [entry for entry in sys.path if entry]
source = sys.stdin.buffer.read(int(sys.argv.pop(1)))
exec(compile(source, "<slimvit>", "exec"))
"""
RUNNER, STORE = Path(device_runner.__file__), Path(device_store.__file__)
SSH_FAILED, NO_COMMAND, NOT_EXECUTABLE = 255, 127, 126
LOOK_LIMIT_S, READ_BYTES_S = 180.0, 5e6
"""How long a device may take to answer, and how many bytes of files it reads in a second besides, from a slow card."""
HINTS = {
    "permission denied": "install your key there: ssh-copy-id {destination}",
    "has changed and you have requested strict": "if the device was set up anew, remove its old key as ssh says: ssh-keygen -R",
    "host key verification failed": "connect once by hand and compare the key: ssh {destination}",
    "could not resolve": "correct `host` in targets.toml",
}
"""Words of ssh's last message, the more telling ones first, and what to do."""


class _Look(BaseModel):
    """What a device reports about itself, as `toolchain.on_device.store.look` returns it."""

    root: str
    python: str
    executable: str
    modules: dict[str, dict[str, str]]
    missing: list[str]


class _Machine(BaseModel):
    system: str
    cpu: str
    cores: int | None


class _Fingerprint(BaseModel):
    machine: _Machine


class _Dropped(Exception):
    """The connection failed; says where and how."""


class _Last(Nobody):
    """Forwards progress reports, and keeps the text of the last one."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.text = progress, ""

    def at(self, share: float, text: str) -> None:
        self.text = text
        self.progress.at(share, text)


class SshTransport:
    """Runs sessions on one device; after a lost connection it connects again once.

    Args:
        name: the target's name, for messages.
        settings: how the device is reached.
        pause_s: how long a lost device is left alone before the second attempt.
    """

    def __init__(self, name: str, settings: SshSettings, *, pause_s: float = 5.0) -> None:
        self.name, self.settings, self.pause_s = name, settings, pause_s
        self.sent: list[str] = []
        """The files that had to be sent, by their names on the device."""
        self._portable = Portable()
        self._root = ""
        self._there: set[str] = set()

    @property
    def destination(self) -> str:
        """The user@host argument for ssh, without what ssh's configuration adds."""
        return "@".join(filter(None, [self.settings.user, self.settings.host]))

    def run(self, schedule: Schedule, progress: Progress) -> Samples:
        """The session's result.

        Raises:
            TargetUnavailable: the device cannot be reached, or lacks something.
            DeviceLost: it is busy, or dropped off twice.
            ArtifactError: a variant cannot be opened there, or gives outputs that are not finite.
            StorageError: its storage is full or read-only.
            MeasurementError: a file arrived altered, or the session failed in another way.
        """
        portable = self._portable.of(schedule)
        try:
            return self._session(portable, progress)
        except _Dropped as lost:
            if not self._root:  # it was never there
                raise TargetUnavailable(self.name, str(lost), self._hint(str(lost))) from None
            log.warning("%s; connecting again in %.0f s", lost, self.pause_s)
            progress.at(0.0, "connection lost, connecting again")
        time.sleep(self.pause_s)
        self._there.clear()
        try:
            return self._session(portable, progress)
        except _Dropped as lost:
            raise DeviceLost(
                self.name,
                f"{lost}, and connecting again did not help. Finished sessions are kept; run the same command again.",
            ) from None

    def probe(self) -> TargetInfo:
        """What answers at the other end; raises TargetUnavailable if nothing does, or something is missing there."""
        runtime = MODULES[self.settings.runtime][-1]
        try:
            seen = self._look({}, "looking at it")
            output = self._start("asking for its fingerprint", RUNNER, ["--fingerprint"], limit_s=LOOK_LIMIT_S)
        except _Dropped as lost:
            raise TargetUnavailable(self.name, str(lost), self._hint(str(lost))) from None
        machine = self._said(_Fingerprint, output, "asking for its fingerprint").machine
        details = {"transport": "ssh", "host": self.destination, "system": machine.system, "python": seen.python}
        version = seen.modules[runtime]["version"]
        return TargetInfo(self.name, runtime, version, f"{machine.cpu}, {machine.cores} cores", details)

    def _session(self, portable: PortableSchedule, progress: Progress) -> Samples:
        runner = f"runner/{sha256(RUNNER)}.py"
        self._ensure({runner: RUNNER, **portable.sources}, progress)
        number = portable.schedule.get("session")
        stage = "a cold start was measured" if number is None else f"session {number + 1} was measured"
        seen = _Last(progress)
        script = f"cd {shlex.quote(self._root)} && {self._python()} {shlex.quote(runner)} - -"
        line = json.dumps(portable.schedule, separators=(",", ":")).encode() + b"\n"
        try:
            output = self._ssh(stage, script, [line], Progress(seen), keep_open=True)
        except _Dropped as lost:
            raise _Dropped(f"{lost} ({seen.text})" if seen.text else str(lost)) from None
        result = self._answer(output, stage)
        if result.pop("schedule_sha256", None) != device_runner.schedule_digest(portable.schedule):
            raise MeasurementError(f"{self._where} sent the samples of another schedule; run the comparison again")
        return result

    def _ensure(self, sources: Mapping[str, Path], progress: Progress) -> None:
        """Sends what is not on the device yet; what is there has been read there and has the right digest."""
        if self._there.issuperset(sources):
            return
        digests = {name: sha256(path) for name, path in sources.items()}
        size = sum(path.stat().st_size for path in sources.values())
        if missing := self._look(digests, "looking for the files on it", size).missing:
            files = [{"path": n, "sha256": digests[n], "size": sources[n].stat().st_size} for n in missing]
            total = sum(sources[name].stat().st_size for name in missing)
            progress.at(0.0, f"sending {len(files)} files, {total / 1e6:.1f} MB")
            header = json.dumps({"files": files}).encode() + b"\n"
            body = (chunk for name in missing for chunk in _chunks(sources[name]))
            self._start("files were sent", STORE, ["receive", self._root], [header], body)
            self.sent += missing
        self._there |= set(sources)

    def _look(self, digests: Mapping[str, str], stage: str, size: int = 0) -> _Look:
        modules = MODULES[self.settings.runtime]
        request = json.dumps({"files": digests, "modules": modules}).encode() + b"\n"
        limit_s = LOOK_LIMIT_S + size / READ_BYTES_S
        output = self._start(stage, STORE, ["look", self.settings.folder], [request], limit_s=limit_s)
        seen = self._said(_Look, output, stage)
        for name in modules:
            if (error := seen.modules[name].get("error")) is not None:
                install = f"{seen.executable} -m pip install {' '.join(modules)}  (on {self.settings.host})"
                raise TargetUnavailable(self.name, f"{self._where} cannot import {name}: {error}.", install)
        self._root = seen.root
        return seen

    def _start(
        self,
        stage: str,
        program: Path,
        arguments: list[str],
        head: Iterable[bytes] = (),
        body: Iterable[bytes] = (),
        *,
        limit_s: float | None = None,
    ) -> bytes:
        """What one of our programs prints when it is run on the device from standard input."""
        source = program.read_bytes()
        words = [self._python(), "-c", *map(shlex.quote, (BOOT, str(len(source)), *arguments))]

        def feed() -> Iterable[bytes]:
            yield source
            yield from head
            yield from body

        return self._ssh(stage, " ".join(words), feed(), limit_s=limit_s)

    def _ssh(
        self,
        stage: str,
        script: str,
        feed: Iterable[bytes],
        progress: Progress = SILENT,
        *,
        keep_open: bool = False,
        limit_s: float | None = None,
    ) -> bytes:
        """What a shell script on the device prints; its process is gone when this returns or raises.

        `exit $?` keeps that shell alive, so that a process killed there is not mistaken for a lost connection.
        """
        script = f"export ORT_DISABLE_TELEMETRY=1; {script}; exit $?"
        if shutil.which("ssh") is None:
            raise TargetUnavailable(self.name, "this machine has no ssh.", "apt-get install openssh-client")
        command = [*self._client(), f"sh -c {shlex.quote(script)}"]
        with (
            tempfile.TemporaryFile() as output,
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.PIPE) as process,
        ):
            assert process.stdin is not None
            assert process.stderr is not None
            timer = threading.Timer(limit_s, process.kill) if limit_s is not None else None
            try:
                if timer is not None:
                    timer.start()
                _write(process.stdin, feed, keep_open=keep_open)
                lines = (line.decode(errors="replace") for line in process.stderr)
                last: Iterable[str] = follow(lines, progress)
                code = process.wait()
            except BaseException:
                process.kill()
                raise
            finally:
                if timer is not None:
                    timer.cancel()
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if code < 0 and limit_s is not None:
                last = [f"no answer within {limit_s:.0f} s"]
            if code:
                self._fail(stage, code, last)
            output.seek(0)
            return output.read()

    def _fail(self, stage: str, code: int, last: Iterable[str]) -> NoReturn:
        message = " ".join(line.strip().rstrip(".") for line in last if line.strip()) or "no message"
        if code == SSH_FAILED or code < 0:
            raise _Dropped(f"the connection to {self._where} failed while {stage}: {message}")
        if code == device_runner.EXIT_VARIANT:
            raise ArtifactError(f"on {self._where}: {message}")
        if code == device_runner.EXIT_FILES:
            raise MeasurementError(f"on {self._where}, while {stage}: {message}; run it again to send the files anew")
        if code == device_store.EXIT_STORAGE:
            place = "make room there, or name another `folder` in targets.toml"
            raise StorageError(f"on {self._where}, while {stage}: {message}; {place}")
        if code == device_runner.EXIT_SCHEDULE:
            raise MeasurementError(f"this cannot be measured on {self._where}: {message}")
        if code == device_runner.EXIT_UNAVAILABLE:
            raise TargetUnavailable(self.name, f"{self._where}: {message}")
        if code == device_runner.EXIT_WORKLOAD:
            raise WorkloadRefused(self.name, f"{self._where}: {message}")
        if code == device_runner.EXIT_BUSY:
            raise DeviceLost(self.name, f"{self._where}: {message}")
        if code in {NO_COMMAND, NOT_EXECUTABLE} or "is too old, 3.8 or newer" in message:
            fix = "install Python 3.8 or newer on it, or name an interpreter as `python` in targets.toml"
            raise TargetUnavailable(self.name, f"{self._where} cannot run {self.settings.python}: {message}.", fix)
        raise MeasurementError(f"{self._where} ended with exit code {code}{how_it_died(code)} while {stage}: {message}")

    def _answer(self, output: bytes, stage: str) -> dict[str, object]:
        """The JSON object on the last line; before it may stand whatever the device's shell says at every start, in any encoding."""
        try:
            answer = json.loads(output.rstrip().rpartition(b"\n")[2])
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise MeasurementError(f"the answer of {self._where} is truncated or no JSON; it came while {stage}")
        return answer

    def _said(self, kind: type[M], output: bytes, stage: str) -> M:
        """The same as a model of its fields; raises MeasurementError if they are others."""
        try:
            return kind.model_validate(self._answer(output, stage))
        except ValidationError as error:
            raise MeasurementError(f"the answer of {self._where} is another one than expected: {error}") from None

    def _client(self) -> list[str]:
        settings = self.settings
        login = [] if settings.user is None else ["-l", settings.user]
        fixed = [word for key, value in OPTIONS.items() for word in ("-o", f"{key}={value}")]
        return ["ssh", "-T", *fixed, *login, *self._where_to, "--", settings.host]

    @property
    def _where_to(self) -> list[str]:
        """The options that ssh, and ssh-copy-id, need to reach the device, beside the destination."""
        given = {"-F": self.settings.ssh_config, "-p": self.settings.port}
        return [word for flag, value in given.items() if value is not None for word in (flag, str(value))]

    def _python(self) -> str:
        """The interpreter as a word for the device's shell, where `~/` has to stay outside the quotes."""
        path = self.settings.python
        return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)

    @property
    def _where(self) -> str:
        return f"{self.name} ({self.destination})"

    def _hint(self, message: str) -> str:
        lower = message.lower()
        hint = next((hint for words, hint in HINTS.items() if words in lower), "ssh {destination} true")
        return hint.format(destination=shlex.join([*self._where_to, self.destination]))


def _write(stream: IO[bytes], feed: Iterable[bytes], *, keep_open: bool) -> None:
    """Writes it all, as far as the other end reads; its exit code tells why it stopped."""
    with contextlib.suppress(BrokenPipeError):
        for chunk in feed:
            stream.write(chunk)
        stream.flush()
        if not keep_open:
            stream.close()


def _chunks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk
