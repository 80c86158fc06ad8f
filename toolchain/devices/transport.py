"""The `Measurer` protocol, which runs a schedule and returns raw samples, and its form for a process on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from toolchain.errors import ArtifactError, MeasurementError, StorageError, TargetUnavailable, WorkloadRefused
from toolchain.files import exclusive, read_json, user_cache, write_json
from toolchain.on_device import runner as device_runner
from toolchain.on_device.runner import Samples, Schedule
from toolchain.progress import Progress

log = logging.getLogger(__name__)
STDERR_LINES = 12
PROGRESS = re.compile(r"progress (\d\.\d{3}) (.*)")


class Measurer(Protocol):
    """Carries out schedules somewhere: on this machine, on a device, or from what was measured before."""

    def run(self, schedule: Schedule, progress: Progress) -> Samples:
        """The result of `toolchain.on_device.runner.run_schedule` for a schedule, from a process of its own.

        Raises:
            ArtifactError: a variant cannot be opened there, or gives outputs that are not finite.
            MeasurementError: the session failed in another way.
        """
        ...


class LocalTransport:
    """A fresh Python process on this machine; the device runner alone where it has the runtime built in.

    One session runs at a time on a machine; another one of the same user waits.

    Args:
        python: the interpreter.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self.python = python

    def run(self, schedule: Schedule, progress: Progress) -> Samples:
        """The session's result; raises as `Measurer.run` does."""
        built_in = all(variant["runtime"] in device_runner.OPENERS for variant in schedule["variants"])
        program = [device_runner.__file__] if built_in else ["-m", "toolchain.devices.worker"]
        root = str(Path(__file__).parents[2])
        environment = {
            **os.environ,
            "ORT_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        with tempfile.TemporaryDirectory(prefix="slimvit-bench-") as folder:
            schedule_path, out_path = Path(folder, "schedule.json"), Path(folder, "samples.json")
            write_json(schedule_path, schedule)
            # -P: the folder of the started file is not importable, so no neighbour can shadow a library.
            command = [self.python, "-P", *program, str(schedule_path), str(out_path)]
            with alone(progress):
                _start(command, environment, progress, schedule["variants"][0]["runtime"])
            result = read_json(out_path)
        if not isinstance(result, dict) or result.pop("schedule_sha256", None) != device_runner.schedule_digest(
            schedule
        ):
            raise MeasurementError("the samples that came back belong to another schedule; run the comparison again")
        return result


def follow(lines: Iterable[str], progress: Progress) -> deque[str]:
    """The last lines since the runner's last progress, when all have come; the progress is passed on as it comes."""
    last: deque[str] = deque(maxlen=STDERR_LINES)
    for line in lines:
        if (report := PROGRESS.fullmatch(line.rstrip())) is not None:
            progress.at(float(report[1]), report[2])
            last.clear()  # what a library said before it went on is no reason to end
        else:
            last.append(line.rstrip())
    return last


def how_it_died(code: int) -> str:
    """What the exit code of a process says of its end, to be put behind the code; a shell adds 128 to the number of a signal."""
    return {
        9: ", most likely for want of memory",
        4: ", at an instruction that its processor lacks: install numpy and the runtime in builds for that processor",
    }.get(-code if code < 0 else code - 128, "")


@contextlib.contextmanager
def alone(progress: Progress) -> Iterator[None]:
    """A block that one process of this machine enters at a time, as far as its cache can be written."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                exclusive(
                    user_cache() / "measuring",
                    lambda: progress.at(0.0, "waiting for another measurement on this machine"),
                )
            )
        except StorageError as error:
            log.warning("%s; other measurements may run beside this one", error)
        yield


def _start(command: list[str], environment: dict[str, str], progress: Progress, runtime: str) -> None:
    """Runs a session's process to its end; raises if it fails, and leaves nothing running if interrupted."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        assert process.stderr is not None
        try:
            last = follow(process.stderr, progress)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    message = "\n".join(last)
    if code == device_runner.EXIT_VARIANT:
        raise ArtifactError(message)
    if code in (device_runner.EXIT_UNAVAILABLE, device_runner.EXIT_WORKLOAD):
        kind = WorkloadRefused if code == device_runner.EXIT_WORKLOAD else TargetUnavailable
        raise kind(runtime, message.removeprefix(kind.opening(runtime)))
    if code == device_runner.EXIT_STORAGE:
        raise StorageError(message)
    if code == device_runner.EXIT_SCHEDULE:
        raise MeasurementError(f"this cannot be measured here: {message}")
    if code != 0:
        raise MeasurementError(
            f"a measuring process ended with exit code {code}{how_it_died(code)}; its last lines:\n{message}"
        )
