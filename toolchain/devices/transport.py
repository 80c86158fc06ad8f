"""How a session's plan reaches a device and its raw samples come back. Here: a fresh process on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from toolchain.errors import ArtifactError, MeasurementError, StorageError, TargetUnavailable
from toolchain.files import exclusive, read_json, user_cache, write_json
from toolchain.on_device import runner as device_runner

log = logging.getLogger(__name__)
STDERR_LINES = 12
PROGRESS = re.compile(r"progress (\d\.\d{3}) (.*)")


class Transport(Protocol):
    """Runs one session somewhere."""

    def run(self, plan: Mapping[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:
        """The session's result as `device_runner.run_plan` gives it, from a process of its own.

        Raises:
            ArtifactError: a variant cannot be opened there, or gives outputs that are not finite.
            MeasurementError: the session failed in another way.
        """
        ...


class LocalTransport:
    """A fresh Python process on this machine; the device runner alone where it has the runtime built in.

    One session runs at a time on a machine; another one of the same user waits.
    """

    def run(self, plan: Mapping[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:
        """The session's result; raises as `Transport.run` does."""
        built_in = all(variant["runtime"] in device_runner.OPENERS for variant in plan["variants"])
        program = [device_runner.__file__] if built_in else ["-m", "toolchain.devices.worker"]
        root = str(Path(__file__).parents[2])
        environment = {
            **os.environ,
            "ORT_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        with tempfile.TemporaryDirectory(prefix="slimvit-bench-") as folder:
            plan_path, out_path = Path(folder, "plan.json"), Path(folder, "samples.json")
            write_json(plan_path, plan)
            # -P: the folder of the started file is not importable, so no neighbour can shadow a library.
            command = [sys.executable, "-P", *program, str(plan_path), str(out_path)]
            with alone(on_progress):
                _start(command, environment, on_progress, plan["variants"][0]["runtime"])
            result = read_json(out_path)
        if not isinstance(result, dict) or result.pop("plan_sha256", None) != device_runner.plan_digest(plan):
            raise MeasurementError("the samples that came back belong to another plan; run the comparison again")
        return result


def follow(lines: Iterable[str], on_progress: Callable[[float, str], None]) -> deque[str]:
    """The last lines that are no progress, when all have come; the runner's progress is passed on as it comes."""
    last: deque[str] = deque(maxlen=STDERR_LINES)
    for line in lines:
        if (found := PROGRESS.fullmatch(line.rstrip())) is not None:
            on_progress(float(found[1]), found[2])
        else:
            last.append(line.rstrip())
    return last


@contextlib.contextmanager
def alone(on_progress: Callable[[float, str], None]) -> Iterator[None]:
    """A block that one process of this machine enters at a time, as far as its cache can be written."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                exclusive(
                    user_cache() / "measuring",
                    lambda: on_progress(0.0, "waiting for another measurement on this machine"),
                )
            )
        except StorageError as error:
            log.warning("%s; other measurements may run beside this one", error)
        yield


def _start(
    command: list[str], environment: dict[str, str], on_progress: Callable[[float, str], None], runtime: str
) -> None:
    """Runs a session's process to its end; raises if it fails, and leaves nothing running if interrupted."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        assert process.stderr is not None
        try:
            last = follow(process.stderr, on_progress)
            code = process.wait()
        except BaseException:
            process.kill()
            raise
    message = "\n".join(last)
    if code == device_runner.EXIT_VARIANT:
        raise ArtifactError(message)
    if code == device_runner.EXIT_UNAVAILABLE:
        raise TargetUnavailable(runtime, message.removeprefix(f"target {runtime!r} is unavailable: "))
    if code == device_runner.EXIT_STORAGE:
        raise StorageError(message)
    if code == device_runner.EXIT_PLAN:
        raise MeasurementError(f"this cannot be measured here: {message}")
    if code != 0:
        raise MeasurementError(f"a measuring process ended with exit code {code}; its last lines:\n{message}")
