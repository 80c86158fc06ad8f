"""What the device runner is told, and sessions that an interrupted measurement left behind."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolchain.artifact import digest_of, read_json, sha256, write_json
from toolchain.bench.samples import ArtifactFacts, Design, Scenario, Session, explain
from toolchain.bench.signature import Signature, read_signature
from toolchain.bench.size import artifact_files
from toolchain.bench.transport import Transport
from toolchain.cache import user_cache
from toolchain.errors import ArtifactError, MeasurementError, RecipeError, StorageError, TargetUnavailable
from toolchain.targets import get_target
from toolchain.targets.device_runner import COLD_PLAN_SCHEMA, PLAN_SCHEMA

log = logging.getLogger(__name__)
INPUT_SETS = 8
FRESH_S = 3600.0
"""How long what an interrupted measurement left is taken up again: later the machine may be in another mood."""
Told = Callable[[float, str], None]


def require_target(target: str, paths: Sequence[Path]) -> None:
    """Raises TargetUnavailable if nothing can be timed on a target, RecipeError if it takes other artifacts."""
    where = get_target(target)
    if not where.measures:
        raise TargetUnavailable(target, "it builds engines but latency cannot be measured on it")
    if (runs := where.probe().details.get("run", "yes")) != "yes":
        raise TargetUnavailable(target, f"engines can be built but not run here ({runs})")
    for path in paths:
        if path.is_dir() != (target == "eager"):
            raise RecipeError(
                f"target {target!r} takes {'model folders' if target == 'eager' else 'files'}, got {path}"
            )


def set_up(
    a: Path,
    *,
    target: str,
    threads: int,
    batch: int,
    input_shape: tuple[int, ...] | None,
    affinity: tuple[int, ...] | None,
    design: Mapping[str, Any],
) -> tuple[Scenario, Design, Signature]:
    """(what is timed, how, the inputs of A); raises RecipeError for what is out of range, and as `read_signature`."""
    try:
        made, signature = Design(**design), read_signature(a, batch, input_shape)
        scenario = Scenario(target=target, threads=threads, batch=batch, inputs=signature.inputs, affinity=affinity)
    except ValidationError as error:
        raise RecipeError(f"cannot measure: {explain(error)}") from None
    return scenario, made, signature


def artifact_facts(path: Path) -> ArtifactFacts:
    """Name, bytes and digest of all files of an artifact."""
    files = artifact_files(path)
    root = path if path.is_dir() else path.parent
    digest = digest_of(*((file.relative_to(root).as_posix(), sha256(file)) for file in files))
    return ArtifactFacts(name=path.name, size_bytes=sum(file.stat().st_size for file in files), sha256=digest)


def session_plan(
    design: Design, scenario: Scenario, variants: Mapping[str, tuple[Path, Signature]], session: int
) -> dict[str, Any]:
    """What the device runner needs for one session."""
    return {
        "schema": PLAN_SCHEMA,
        "seed": design.seed,
        "session": session,
        "blocks": design.blocks_of(session),
        "slot_ms": design.slot_ms,
        "threads": scenario.threads,
        "affinity": scenario.affinity,
        "warmup": {"calls": design.warmup_calls, "seconds": design.warmup_s},
        "inputs": _inputs(design, scenario, INPUT_SETS),
        "variants": [_variant(name, scenario, path, signature) for name, (path, signature) in variants.items()],
    }


def cold_plan(design: Design, scenario: Scenario, path: Path, signature: Signature) -> dict[str, Any]:
    """What the device runner needs for one cold start."""
    return {
        "schema": COLD_PLAN_SCHEMA,
        "threads": scenario.threads,
        "affinity": scenario.affinity,
        "inputs": _inputs(design, scenario, 1),
        "variants": [_variant("A", scenario, path, signature)],
    }


def _inputs(design: Design, scenario: Scenario, count: int) -> dict[str, Any]:
    tensors = [spec.model_dump(mode="json") for spec in scenario.inputs]
    return {"count": count, "seed": design.seed, "tensors": tensors}


def _variant(name: str, scenario: Scenario, path: Path, signature: Signature) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(path.resolve()),
        "runtime": scenario.target,
        "inputs": list(signature.names),
    }


class Sessions:
    """The sessions of one measurement, each kept in the user's cache until the whole is finished.

    An interrupted measurement leaves them there; the next one of the same artifacts, scenario, design and target takes
    them up if they are fresh and the machine is the same.
    """

    def __init__(self, transport: Transport, key: str) -> None:
        self._transport = transport
        self._folder = user_cache() / "sessions" / key

    def run(self, plan: Mapping[str, Any], told: Told) -> Session:
        """One session, measured now or by the interrupted run.

        Raises:
            ArtifactError, MeasurementError: as `Transport.run`; what came back is no session.
        """
        kept = self._folder / f"{plan['session']}.json"
        if (found := _fresh(kept)) is not None:
            log.info("session %d was measured by an interrupted run; taken from %s", plan["session"], kept)
            return found
        result = self._transport.run(plan, told)
        try:
            session = Session.model_validate_json(json.dumps(result))
        except ValidationError as error:
            raise MeasurementError(f"session {plan['session']}: {explain(error)}") from None
        try:
            write_json(kept, result)
        except StorageError as error:  # the samples are in memory; only taking up after an interruption is lost
            log.warning("session %d is not kept on disk: %s", plan["session"], error)
        return session

    def finished(self) -> None:
        """Forgets them: they are part of a result now."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _fresh(path: Path) -> Session | None:
    try:
        if time.time() - path.stat().st_mtime > FRESH_S:
            return None
        return Session.model_validate_json(json.dumps(read_json(path)))
    except (OSError, ValidationError, ArtifactError, StorageError):
        return None
