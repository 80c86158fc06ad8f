"""What the device runner is told, and the session that comes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolchain.artifacts import ARTIFACTS, Signature, open_artifact
from toolchain.devices.transport import Transport
from toolchain.errors import MeasurementError, RecipeError, TargetUnavailable
from toolchain.measure.samples import ArtifactFacts, Design, Scenario, Session, explain
from toolchain.on_device.runner import COLD_PLAN_SCHEMA, PLAN_SCHEMA
from toolchain.targets import MODES, get_target

INPUT_SETS = 8
Told = Callable[[float, str], None]


def require_target(target: str, paths: Sequence[Path]) -> None:
    """Raises TargetUnavailable if nothing can be timed on a target, RecipeError if it takes other artifacts."""
    where = get_target(target)
    if not where.measures:
        raise TargetUnavailable(target, "it builds engines but latency cannot be measured on it")
    where.require_run()
    words = " and ".join(f"{ARTIFACTS[kind].word}s" for kind in where.takes)
    for artifact in map(open_artifact, paths):
        if artifact.name not in where.takes:
            raise RecipeError(f"target {target!r} takes {words}, got {artifact.path}")


def require_threads(target: str, threads: Sequence[int]) -> None:
    """Raises RecipeError if threads of the CPU are asked for where a GPU does the work: the result would name them."""
    if target in MODES and any(count != 1 for count in threads):
        raise RecipeError(f"target {target!r} runs on a GPU, where threads mean nothing; leave them at 1")


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
    """(what is timed, how, the inputs of A); raises RecipeError for what is out of range, and as `Artifact.signature`."""
    require_threads(target, (threads,))
    try:
        made, signature = Design(**design), open_artifact(a).signature(batch, input_shape)
        scenario = Scenario(target=target, threads=threads, batch=batch, inputs=signature.inputs, affinity=affinity)
    except ValidationError as error:
        raise RecipeError(f"cannot measure: {explain(error)}") from None
    return scenario, made, signature


def artifact_facts(path: Path) -> ArtifactFacts:
    """Name, bytes and digest of an artifact."""
    artifact = open_artifact(path)
    return ArtifactFacts(name=path.name, size_bytes=artifact.size_bytes, sha256=artifact.sha256)


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
    own = {} if signature.inputs == scenario.inputs else {"dtypes": [spec.dtype for spec in signature.inputs]}
    return {
        "name": name,
        "path": str(path.resolve()),
        "runtime": scenario.target,
        "inputs": list(signature.names),
        **own,
    }


def run_session(transport: Transport, plan: Mapping[str, Any], told: Told) -> Session:
    """One session, in a process of its own; raises as `Transport.run`, and MeasurementError for what is no session."""
    result = transport.run(plan, told)
    try:
        return Session.model_validate_json(json.dumps(result))
    except ValidationError as error:
        raise MeasurementError(f"session {plan['session']}: {explain(error)}") from None
