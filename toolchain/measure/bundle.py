"""A comparison for a device that no network reaches: a tar goes there, a file of samples comes back.

The bundle is what a result is judged by: it holds the artifacts and the question, and the comparison is made from both
as if its sessions had just been run.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256 as hash_of
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from toolchain.devices.portable import FOLDER, Portable, PortablePlan
from toolchain.errors import ArtifactError, MeasurementError, StorageError
from toolchain.files import atomic_path, sha256
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import BLOCKS, SESSIONS, WARMUP_S
from toolchain.on_device import bundle_run
from toolchain.on_device import runner as device_runner

RUN_SH = '#!/bin/sh\n# PYTHON names another interpreter: PYTHON=/opt/venv/bin/python sh run.sh\n\
cd "$(dirname "$0")" && exec "${PYTHON:-python3}" run.py\n'
README = """A slimvit comparison, to be measured on this device.

It needs Python 3.8 or newer with numpy and onnxruntime, and no network.
Close what else runs, then:

    sh run.sh

A run that was cut off goes on where it stopped; after the end, another run measures anew. Send result.json
back; on the other side:

    slimvit bench unpack result.json BUNDLE.tar
"""
PROGRAMS = {"run.py": Path(bundle_run.__file__), bundle_run.RUNNER: Path(device_runner.__file__)}
TEXTS = {"run.sh": RUN_SH, "README.txt": README}
MAX_JSON_BYTES = 1 << 30


@dataclass(frozen=True)
class Question:
    """What `compare` is asked, but for the artifacts and the place."""

    target: str
    threads: int = 1
    batch: int = 1
    input_shape: tuple[int, ...] | None = None
    affinity: tuple[int, ...] | None = None
    sessions: int = SESSIONS
    blocks: int = BLOCKS
    looks: int = 1  # nothing can be added once the tar is on its way
    tau: float = 0.05
    seed: int = 0
    slot_ms: float = 50.0
    warmup_s: float = WARMUP_S


def pack(a: Path, b: Path, out: Path, question: Question) -> dict[str, Any]:
    """Writes the bundle that asks how B compares with A; returns its bundle.json.

    The same artifacts and the same question give the same bytes.

    Args:
        a: the baseline.
        b: what is compared with it.
        out: the tar to write.
        question: how they are compared.

    Raises:
        StorageError: `out` cannot be written.
        SlimvitError: whatever `compare` says of artifacts or options that do not fit.
    """
    first = _first_plan(a, b, question)
    plans = [{**first.plan, "session": session} for session in range(question.sessions)]
    sources = {**first.sources, **PROGRAMS}
    texts = {name: text.encode() for name, text in TEXTS.items()}
    digests = {name: hash_of(text).hexdigest() for name, text in texts.items()}
    digests |= {name: sha256(path) for name, path in sources.items()}
    bundle = {
        "schema": bundle_run.BUNDLE_SCHEMA,
        "question": asdict(question),
        "plans": plans,
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
    return bundle


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
        facts, digest = _open_bundle(bundle, Path(folder))
        answers = _read_result(result, bundle, digest)
        try:
            question = TypeAdapter(Question).validate_python(facts["question"])
            a, b = (Path(folder, facts["plans"][0]["variants"][index]["path"]) for index in (0, 1))
        except (KeyError, IndexError, TypeError, ValidationError):
            raise ArtifactError(f"{bundle}: its {bundle_run.BUNDLE} is not one of this version") from None
        return compare(a, b, **asdict(question), transport=_Answers(answers, result))


class _Asked(Exception):
    """Carries the plan of the first session out of `compare`."""

    def __init__(self, plan: PortablePlan) -> None:
        super().__init__()
        self.plan = plan


@dataclass(frozen=True)
class _Asking:
    """A transport that goes nowhere: it only learns what would be asked."""

    def run(self, plan: Mapping[str, Any], on_progress: Callable[[float, str], None]) -> NoReturn:  # noqa: ARG002
        raise _Asked(Portable().of(plan))


@dataclass(frozen=True)
class _Answers:
    """A transport whose sessions were run before: plan digest → result."""

    sessions: Mapping[str, dict[str, Any]]
    source: Path

    def run(self, plan: Mapping[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:  # noqa: ARG002
        digest = device_runner.plan_digest(Portable().of(plan).plan)
        if digest not in self.sessions:
            raise MeasurementError(
                f"{self.source} holds no samples for session {plan['session'] + 1}; they were taken for another plan, "
                "or another version of slimvit made the bundle. Pack and measure again."
            )
        return dict(self.sessions[digest])


def _first_plan(a: Path, b: Path, question: Question) -> PortablePlan:
    """The portable plan of the first session; the others differ in their number alone."""
    try:
        compare(a, b, **asdict(question), transport=_Asking())
    except _Asked as asked:
        return asked.plan
    raise AssertionError("compare ran no session")


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = size, 0, 0o755 if name == "run.sh" else 0o644
    return entry


def _open_bundle(bundle: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """(bundle.json, its sha256), with the bundle's artifacts, checked, below `folder`."""
    try:
        with tarfile.open(bundle, "r:") as tar:
            raw = _read(tar, bundle_run.BUNDLE)
            facts = _json(raw, f"{bundle}: {bundle_run.BUNDLE}", bundle_run.BUNDLE_SCHEMA)
            for name, digest in facts["files"].items():
                path = PurePosixPath(name)
                if not path.parts or path.is_absolute() or ".." in path.parts:
                    raise ArtifactError(f"{bundle} names {name!r}, which lies outside of it")
                found = _extract(tar, name, folder.joinpath(*path.parts) if path.parts[0] == FOLDER else None)
                if found != digest:
                    raise ArtifactError(f"{bundle} was altered: {name} has sha256 {found}, it lists {digest}")
    except OSError as error:
        raise StorageError(f"cannot read {bundle}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{bundle} is no bundle, or is truncated: {error}") from None
    return facts, hash_of(raw).hexdigest()


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


def _read_result(path: Path, bundle: Path, digest: str) -> dict[str, dict[str, Any]]:
    """Plan digest → session, of a result that answers the bundle of this digest."""
    try:
        if path.is_file() and tarfile.is_tarfile(path):
            with tarfile.open(path, "r:*") as tar:
                (name,) = [entry.name for entry in tar if PurePosixPath(entry.name).name == bundle_run.RESULT]
                raw = _read(tar, name)
        else:
            raw = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path} holds no {bundle_run.RESULT}, or is truncated: {error}") from None
    result = _json(raw, str(path), bundle_run.RESULT_SCHEMA)
    if result.get("sha256") != bundle_run.body_sha256(result):
        raise ArtifactError(f"{path} was altered: its content does not have the sha256 that it states. Measure again.")
    if result.get("bundle") != digest:
        raise ArtifactError(f"{path} answers another bundle than {bundle}")
    try:
        return {session.pop("plan_sha256"): session for session in result["sessions"]}
    except (KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path} has no sessions, or sessions without the digest of their plan") from None


def _json(raw: bytes, what: str, schema: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise ArtifactError(f"{what} is truncated or no JSON: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != schema:
        got = found.get("schema") if isinstance(found, dict) else None
        raise ArtifactError(f"{what} has schema {got!r}; expected {schema!r}")
    return found
