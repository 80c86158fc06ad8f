"""A comparison for a device that no network reaches: a tar goes there, a file of samples comes back.

The bundle is what a result is judged by: it holds the artifacts and the question, and the comparison is made from both
as if its sessions had just been run.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256 as hash_of
from pathlib import Path, PurePosixPath
from typing import IO, Annotated

from pydantic import BaseModel, Field, ValidationError

from toolchain.devices.portable import FOLDER, Portable
from toolchain.errors import ArtifactError, MeasurementError
from toolchain.files import atomic_path, reading, sha256
from toolchain.measure.compare import plan_comparison
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import Design, Workload
from toolchain.on_device import bundle_run
from toolchain.on_device import runner as device_runner
from toolchain.on_device.runner import MODULES, Samples, Schedule
from toolchain.progress import Progress

RUN_SH = """#!/bin/sh
# PYTHON names another interpreter: PYTHON=/opt/venv/bin/python sh run.sh
cd "$(dirname "$0")" || exit 74
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys
if sys.version_info < (3, 8):
    sys.exit("Python " + sys.version.split()[0] + " is too old, 3.8 or newer is needed; PYTHON=... names another one")' || exit 5
exec "$PYTHON" run.py
"""
README = """A slimvit comparison, to be measured on this device.

It needs Python 3.8 or newer with {modules}, and no network.
Close what else runs, then:

    sh run.sh

A run that was cut off goes on where it stopped; after the end, another run measures anew. Send result.json
back; on the other side:

    slimvit bench unpack result.json BUNDLE.tar
"""
PROGRAMS = {"run.py": Path(bundle_run.__file__), bundle_run.RUNNER: Path(device_runner.__file__)}
MAX_JSON_BYTES = 1 << 30


@dataclass(frozen=True)
class Question:
    """What a bundle asks, but for the artifacts: the runtime, what a call is, and how it is timed."""

    runtime: str
    workload: Workload
    design: Design


class _Variant(BaseModel):
    path: str


class _Scheduled(BaseModel):
    variants: Annotated[list[_Variant], Field(min_length=2)]


class _Bundle(BaseModel):
    """What is read of bundle.json here; the device reads the rest."""

    question: Question
    schedules: Annotated[list[_Scheduled], Field(min_length=1)]
    files: dict[str, str]


def pack(a: Path, b: Path, out: Path, question: Question) -> int:
    """Writes the bundle that asks how B compares with A; returns how many files are in it.

    The same artifacts and the same question give the same bytes. There is one look: nothing can be added once the tar is
    on its way.

    Args:
        a: the baseline.
        b: what is compared with it.
        out: the tar to write.
        question: how they are compared.

    Raises:
        StorageError: `out` cannot be written.
        SlimvitError: as `compare`, for artifacts or numbers that do not fit.
    """
    design = question.design.once
    trial, portable = plan_comparison(a, b, question.runtime, question.workload, design), Portable()
    schedules = [portable.of(trial.schedule(session)) for session in range(design.sessions)]
    sources = {**schedules[0].sources, **PROGRAMS}
    modules = MODULES[question.runtime]
    texts = {"run.sh": RUN_SH.encode(), "README.txt": README.format(modules=" and ".join(modules)).encode()}
    digests = {name: hash_of(text).hexdigest() for name, text in texts.items()}
    digests |= {name: sha256(path) for name, path in sources.items()}
    bundle = {
        "schema": bundle_run.BUNDLE_SCHEMA,
        "question": {
            "runtime": question.runtime,
            "workload": asdict(question.workload),
            "design": design.model_dump(mode="json"),
        },
        "modules": [*modules],
        "schedules": [each.schedule for each in schedules],
        "files": dict(sorted(digests.items())),
    }
    texts[bundle_run.BUNDLE] = (json.dumps(bundle, indent=1, sort_keys=True) + "\n").encode()
    with atomic_path(out) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted([*texts, *sources]):
            if name in texts:
                tar.addfile(_entry(name, len(texts[name])), io.BytesIO(texts[name]))
            else:
                with sources[name].open("rb") as file:
                    tar.addfile(_entry(name, sources[name].stat().st_size), file)
    return len(digests)


def unpack(result: Path, bundle: Path) -> Comparison:
    """The comparison that a bundle asked for, from the samples that came back.

    Args:
        result: the device's result.json, or a tar that holds it.
        bundle: the tar that was sent.

    Raises:
        StorageError: a file cannot be read.
        ArtifactError: one of them is truncated or altered, or they do not belong together.
        ParityError: the outputs of the two artifacts differ in shape.
        MeasurementError: the sessions do not belong together.
    """
    with tempfile.TemporaryDirectory(prefix="slimvit-bundle-") as folder:
        content, digest = _open_bundle(bundle, Path(folder))
        answers, question = _read_result(result, bundle, digest), content.question
        a, b = (Path(folder, variant.path) for variant in content.schedules[0].variants[:2])
        trial = plan_comparison(a, b, question.runtime, question.workload, question.design)
        return trial.run(_Answers(answers, result))


@dataclass(frozen=True)
class _Answers:
    """Reads sessions that were run before: digest of the schedule → samples."""

    sessions: Mapping[str, Samples]
    source: Path

    def run(self, schedule: Schedule, progress: Progress) -> Samples:  # noqa: ARG002
        digest = device_runner.schedule_digest(Portable().of(schedule).schedule)
        if digest not in self.sessions:
            raise MeasurementError(
                f"{self.source} holds no samples for session {schedule['session'] + 1}; they were taken for another schedule, "
                "or another version of slimvit made the bundle. Pack and measure again."
            )
        return dict(self.sessions[digest])


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, 0, 0o755 if name == "run.sh" else 0o644
    return entry


def _open_bundle(bundle: Path, folder: Path) -> tuple[_Bundle, str]:
    """(bundle.json, its sha256), with the bundle's artifacts, checked, below `folder`."""
    try:
        with reading(bundle), tarfile.open(bundle, "r:") as tar:
            raw = _read(tar, bundle_run.BUNDLE)
            _json(raw, f"{bundle}: {bundle_run.BUNDLE}", bundle_run.BUNDLE_SCHEMA)
            content = _Bundle.model_validate_json(raw)
            for name, digest in content.files.items():
                path = PurePosixPath(name)
                if not path.parts or path.is_absolute() or ".." in path.parts:
                    raise ArtifactError(f"{bundle} names {name!r}, which lies outside of it")
                there = _extract(tar, name, folder.joinpath(*path.parts) if path.parts[0] == FOLDER else None)
                if there != digest:
                    raise ArtifactError(f"{bundle} was altered: {name} has sha256 {there}, it lists {digest}")
    except ValidationError:
        raise ArtifactError(f"{bundle}: its {bundle_run.BUNDLE} is not one of this version") from None
    except (tarfile.TarError, EOFError, KeyError) as error:
        raise ArtifactError(f"{bundle} is no bundle, or is truncated: {error}") from None
    return content, hash_of(raw).hexdigest()


def _member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    """An ordinary file of a tar; links and devices are refused. Raises KeyError if there is none."""
    info = tar.getmember(name)
    stream = tar.extractfile(info) if info.isreg() else None
    if stream is None:
        raise tarfile.TarError(f"{name} is no ordinary file")
    return stream


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    raw = _member(tar, name).read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise tarfile.TarError(f"{name} is too large")
    return raw


def _extract(tar: tarfile.TarFile, name: str, target: Path | None) -> str:
    """sha256 of an entry, which is written to `target` if there is one."""
    digest = hash_of()
    with _member(tar, name) as stream:
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        with (target or Path("/dev/null")).open("wb") as out:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                out.write(chunk)
    return digest.hexdigest()


def _read_result(path: Path, bundle: Path, digest: str) -> dict[str, Samples]:
    """Plan digest → session, of a result that answers the bundle of this digest."""
    try:
        with reading(path):
            if path.is_file() and tarfile.is_tarfile(path):
                with tarfile.open(path, "r:*") as tar:
                    (name,) = [entry.name for entry in tar if PurePosixPath(entry.name).name == bundle_run.RESULT]
                    raw = _read(tar, name)
            else:
                raw = path.read_bytes()
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} holds no {bundle_run.RESULT}, or is truncated: {error}") from None
    result = _json(raw, str(path), bundle_run.RESULT_SCHEMA)
    if result.get("sha256") != bundle_run.body_sha256(result):
        raise ArtifactError(f"{path} was altered: its content does not have the sha256 that it states. Measure again.")
    if result.get("bundle") != digest:
        raise ArtifactError(f"{path} answers another bundle than {bundle}")
    sessions = result.get("sessions")
    if not isinstance(sessions, list) or not all(
        isinstance(each, dict) and "schedule_sha256" in each for each in sessions
    ):
        raise ArtifactError(f"{path} has no sessions, or sessions without the digest of their schedule")
    return {session.pop("schedule_sha256"): session for session in sessions}


def _json(raw: bytes, what: str, schema: str) -> dict[str, object]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ArtifactError(f"{what} is truncated or no JSON: {error}") from None
    got = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(value, dict) or got != schema:
        raise ArtifactError(f"{what} has schema {got!r}; expected {schema!r}")
    return value
