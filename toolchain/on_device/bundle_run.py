"""The sessions of a bundle, run on a device without a network. Standard library only, Python 3.8.

Usage: `python run.py`, in the unpacked folder, by run.sh, which refuses a Python too old to read this. Every file is checked
against bundle.json; each session runs in a fresh process; finished ones are kept in sessions/ until all are there, so that a
run that was cut off goes on; result.json is what to send back. Another run measures anew, and calls the result before it
result.old.json. Exit codes: 0 good, 4 the bundle is incomplete or altered, 5 this Python lacks something; else that of the
session that failed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BUNDLE_SCHEMA, RESULT_SCHEMA = "slimvit.bench.bundle/1", "slimvit.bench.result/1"
BUNDLE, RESULT, RUNNER, SESSIONS = "bundle.json", "result.json", "device_runner.py", "sessions"
OLD_RESULT = "result.old.json"
EXIT_FILES, EXIT_UNAVAILABLE = 4, 5


def body_sha256(result: Mapping[str, object]) -> str:
    """sha256 of a result's canonical JSON without its own `sha256`: shows accidents and clumsy edits, not forgery."""
    body = {key: value for key, value in result.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def lacks(needed: Sequence[str]) -> str:
    """Which modules this Python lacks, and what brings them; "" if it has all.

    Args:
        needed: the modules of bundle.json.
    """
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be imported; {sys.executable} -m pip install {' '.join(needed)}"
    return ""


def main() -> int:
    """The exit code; progress goes to stderr."""
    root = Path(__file__).resolve().parent
    raw = (root / BUNDLE).read_bytes()
    bundle = json.loads(raw.decode("utf-8"))
    if lacking := lacks(bundle["modules"]):
        sys.stderr.write(lacking + "\n")
        return EXIT_UNAVAILABLE
    wrong = [name for name, digest in bundle["files"].items() if _sha256(root / name) != digest]
    if wrong:
        sys.stderr.write(f"missing or altered: {', '.join(wrong)}; unpack the bundle again\n")
        return EXIT_FILES
    if not (root / SESSIONS).exists() and (root / RESULT).exists():
        (root / RESULT).replace(root / OLD_RESULT)
    (root / SESSIONS).mkdir(exist_ok=True)
    sessions = []
    for schedule in bundle["schedules"]:
        digest = hashlib.sha256(json.dumps(schedule, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        out = root / SESSIONS / f"{digest}.json"
        if not out.exists():
            sys.stderr.write(f"session {schedule['session'] + 1}/{len(bundle['schedules'])}\n")
            schedule_path = root / SESSIONS / f"{digest}.schedule"
            schedule_path.write_text(json.dumps(schedule), encoding="utf-8")
            environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
            command = [sys.executable, str(root / RUNNER), str(schedule_path), str(out)]
            code, last = _followed(command, root, environment)
            if code:
                sys.stderr.writelines(last)
                sys.stderr.write(f"the session ended with exit code {code}; it was not recorded\n")
                return code
        sessions.append(json.loads(out.read_text(encoding="utf-8")))
    result = {"schema": RESULT_SCHEMA, "bundle": hashlib.sha256(raw).hexdigest(), "sessions": sessions}
    partial = root / (RESULT + ".partial")
    partial.write_text(json.dumps({**result, "sha256": body_sha256(result)}, separators=(",", ":")), encoding="utf-8")
    partial.replace(root / RESULT)
    shutil.rmtree(str(root / SESSIONS), ignore_errors=True)
    sys.stderr.write(f"done: {root / RESULT} is what to send back\n")
    return 0


def _followed(command: Sequence[str], root: Path, environment: Mapping[str, str]) -> tuple[int, list[str]]:
    """(exit code, what was said since the last progress) of a session, whose progress is passed on.

    Runtimes tell of themselves when they load a file; that matters only where the session then fails.
    """
    last: list[str] = []
    with subprocess.Popen(
        command, cwd=str(root), env=environment, stderr=subprocess.PIPE, universal_newlines=True, errors="replace"
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            last = [] if line.startswith("progress ") else [*last, line]
            if not last:
                sys.stderr.write(line)
                sys.stderr.flush()
        code = process.wait()
    return code, last


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
