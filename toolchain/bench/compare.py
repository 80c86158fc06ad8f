"""Two artifacts on one target: parity of form first, then paired sessions, then the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from toolchain.artifact import digest_of, sha256
from toolchain.bench.protocol import (
    CONTROL,
    VARIANTS,
    A,
    ArtifactFacts,
    B,
    Comparison,
    Design,
    Parity,
    Scenario,
    Session,
    explain,
)
from toolchain.bench.signature import Signature, read_signature
from toolchain.bench.size import artifact_files
from toolchain.bench.transport import LocalTransport, Transport
from toolchain.errors import MeasurementError, ParityError, RecipeError, TargetUnavailable
from toolchain.targets import get_target
from toolchain.targets.device_runner import PLAN_SCHEMA

INPUT_SETS = 8


def compare(
    a: Path,
    b: Path,
    *,
    target: str,
    threads: int = 1,
    batch: int = 1,
    input_shape: tuple[int, ...] | None = None,
    sessions: int = 3,
    blocks: int = 20,
    tau: float = 0.05,
    seed: int = 0,
    slot_ms: float = 50.0,
    warmup_s: float = 1.0,
    parity: Parity = "not claimed",
    transport: Transport | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """B timed against A, interleaved with A itself as control, each session in a fresh process.

    Args:
        a: the baseline: an ONNX file, or for "eager" a model folder.
        b: what is compared with it.
        target: name of the target.
        threads: intra-op threads.
        batch: first dimension of the inputs.
        input_shape: shape of one sample; only needed where a file leaves it open.
        sessions: fresh processes.
        blocks: per session; each holds one slot of A, of B and of A again.
        tau: tolerance of the verdict, as a share of A's time.
        seed: of the inputs, the order within blocks and the bootstrap.
        slot_ms: shortest slot.
        warmup_s: shortest warm-up of a variant.
        parity: what the caller has proven about B and A.
        transport: where the sessions run; None is this machine.
        on_progress: receives (what was done, share done).

    Raises:
        RecipeError: an option is out of range or does not fit the artifacts.
        StorageError: an artifact cannot be read.
        ArtifactError: an artifact is damaged, cannot be opened, or gives outputs that are not finite.
        ParityError: A and B differ in their inputs, or in the shape of their outputs.
        TargetUnavailable: the target is not there, or cannot be timed.
        MeasurementError: a session failed, or the machine changed between sessions.
    """
    where = get_target(target)
    if not where.measures:
        raise TargetUnavailable(target, "it builds engines but latency cannot be measured on it")
    if (runs := where.probe().details.get("run", "yes")) != "yes":
        raise TargetUnavailable(target, f"engines can be built but not run here ({runs})")
    for path in (a, b):
        if path.is_dir() != (target == "eager"):
            raise RecipeError(
                f"target {target!r} takes {'model folders' if target == 'eager' else 'files'}, got {path}"
            )
    try:
        design = Design(sessions=sessions, blocks=blocks, slot_ms=slot_ms, warmup_s=warmup_s, tau=tau, seed=seed)
        signatures = {name: read_signature(path, batch, input_shape) for name, path in ((A, a), (B, b))}
        scenario = Scenario(target=target, threads=threads, batch=batch, inputs=signatures[A].inputs)
    except ValidationError as error:
        raise RecipeError(f"cannot measure: {explain(error)}") from None
    if signatures[A].inputs != signatures[B].inputs:
        raise ParityError(
            f"{a} and {b} cannot be compared: their inputs are {_show(signatures[A])} and {_show(signatures[B])}"
        )
    artifacts: dict[Literal["A", "B"], ArtifactFacts] = {A: _facts(a), B: _facts(b)}
    plan = _plan(design, scenario, {A: (a, signatures[A]), B: (b, signatures[B]), CONTROL: (a, signatures[A])})
    transport = transport or LocalTransport()
    results: list[dict[str, Any]] = []
    for index in range(design.sessions):

        def report(share: float, text: str, index: int = index) -> None:
            if on_progress is not None:
                on_progress(f"session {index + 1}/{sessions}, {text}", (index + share) / sessions)

        results.append(transport.run({**plan, "session": index}, report))
        _require_equal_outputs(a, b, results[-1])
    try:
        measured = tuple(Session.model_validate_json(json.dumps(result)) for result in results)
        return Comparison(scenario=scenario, design=design, parity=parity, artifacts=artifacts, sessions=measured)
    except ValidationError as error:
        raise MeasurementError(f"{a} against {b} on {target}: {explain(error)}") from None


def _plan(design: Design, scenario: Scenario, variants: dict[str, tuple[Path, Signature]]) -> dict[str, Any]:
    """What the device runner needs for one session, but for the number of the session."""
    return {
        "schema": PLAN_SCHEMA,
        "seed": design.seed,
        "blocks": design.blocks,
        "slot_ms": design.slot_ms,
        "threads": scenario.threads,
        "warmup": {"calls": design.warmup_calls, "seconds": design.warmup_s},
        "inputs": {
            "count": INPUT_SETS,
            "seed": design.seed,
            "tensors": [spec.model_dump(mode="json") for spec in scenario.inputs],
        },
        "variants": [
            {
                "name": name,
                "path": str(variants[name][0].resolve()),
                "runtime": scenario.target,
                "inputs": list(variants[name][1].names),
            }
            for name in VARIANTS
        ],
    }


def _facts(path: Path) -> ArtifactFacts:
    files = artifact_files(path)
    root = path if path.is_dir() else path.parent
    digest = digest_of(*((file.relative_to(root).as_posix(), sha256(file)) for file in files))
    return ArtifactFacts(name=path.name, size_bytes=sum(file.stat().st_size for file in files), sha256=digest)


def _require_equal_outputs(a: Path, b: Path, result: dict[str, Any]) -> None:
    ours, theirs = (result["variants"][name]["outputs"] for name in (A, B))
    if ours != theirs:
        raise ParityError(f"{a} and {b} cannot be compared: their outputs have the shapes {ours} and {theirs}")


def _show(signature: Signature) -> str:
    return ", ".join(
        f"{name} {spec.dtype}{list(spec.shape)}" for name, spec in zip(signature.names, signature.inputs, strict=True)
    )
