"""Two artifacts on one target: parity of form first, then paired sessions, judged while they grow, then the verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from toolchain.artifacts import Signature, open_artifact
from toolchain.devices.transport import LocalTransport, Transport
from toolchain.errors import MeasurementError, ParityError
from toolchain.measure.comparison import Comparison, Undecided, without_verdict
from toolchain.measure.samples import (
    BLOCKS,
    CONTROL,
    LOOKS,
    SESSIONS,
    VARIANTS,
    WARMUP_S,
    A,
    ArtifactFacts,
    B,
    Parity,
    Session,
    explain,
)
from toolchain.measure.schedule import (
    artifact_facts,
    require_target,
    run_session,
    session_plan,
    set_up,
)


def compare(
    a: Path,
    b: Path,
    *,
    target: str,
    threads: int = 1,
    batch: int = 1,
    input_shape: tuple[int, ...] | None = None,
    affinity: tuple[int, ...] | None = None,
    sessions: int = SESSIONS,
    blocks: int = BLOCKS,
    looks: int = LOOKS,
    tau: float = 0.05,
    seed: int = 0,
    slot_ms: float = 50.0,
    warmup_s: float = WARMUP_S,
    parity: Parity = "not claimed",
    undecided: Undecided = without_verdict,
    transport: Transport | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> Comparison:
    """B timed against A, interleaved with A itself as control, each session in a fresh process.

    While nothing can be said, and looks are left, as much again is measured. Every look is judged at confidence
    1 − 5 %/looks, so that looking often does not buy a verdict.

    Args:
        a: the baseline: an ONNX file, or for "eager" a model folder.
        b: what is compared with it.
        target: name of the target.
        threads: intra-op threads.
        batch: first dimension of the inputs.
        input_shape: shape of one sample; only needed where a file leaves it open.
        affinity: the cores to run on; None is all that the process may use.
        sessions: fresh processes of each look.
        blocks: per session of the first look; each holds one slot of A, of B and of A again.
        looks: how often to judge at most, 1…4.
        tau: tolerance of the verdict, as a share of A's time.
        seed: of the inputs, the order within blocks and the bootstrap.
        slot_ms: shortest slot.
        warmup_s: shortest warm-up of a variant.
        parity: what the caller has proven about B and A.
        undecided: whether a look leaves open what the caller wants to know; the verdict is wanted if nothing is said.
        transport: where the sessions run; None is this machine. `toolchain.devices.device.open_device` gives one that keeps
            finished sessions for the next run, should this one be cut off.
        on_progress: receives (what was done, share done); the share jumps where fewer looks sufficed.

    Raises:
        RecipeError: an option is out of range or does not fit the artifacts.
        StorageError: an artifact cannot be read.
        ArtifactError: an artifact is damaged, cannot be opened, or gives outputs that are not finite.
        ParityError: A and B differ in their inputs, or in the shape of their outputs.
        TargetUnavailable: the target is not there, or cannot be timed.
        MeasurementError: a session failed, or the machine changed between sessions.
    """
    require_target(target, (a, b))
    scenario, design, ours = set_up(
        a,
        target=target,
        threads=threads,
        batch=batch,
        input_shape=input_shape,
        affinity=affinity,
        design={
            "sessions": sessions,
            "blocks": blocks,
            "looks": looks,
            "slot_ms": slot_ms,
            "warmup_s": warmup_s,
            "tau": tau,
            "seed": seed,
        },
    )
    theirs = open_artifact(b).signature(batch, input_shape)
    if not ours.fits(theirs):
        raise ParityError(f"{a} and {b} cannot be compared: their inputs are {_show(ours)} and {_show(theirs)}")
    artifacts: dict[Literal["A", "B"], ArtifactFacts] = {A: artifact_facts(a), B: artifact_facts(b)}
    variants = dict(zip(VARIANTS, ((a, ours), (b, theirs), (a, ours)), strict=True))
    assert list(variants) == [A, B, CONTROL]
    transport = transport or LocalTransport()
    done: list[Session] = []

    def report(share: float, text: str) -> None:
        if on_progress is not None:
            start, end = design.share(len(done)), design.share(len(done) + 1)
            on_progress(f"session {len(done) + 1}, {text}", start + share * (end - start))

    while True:
        for _ in range(design.sessions):
            done.append(run_session(transport, session_plan(design, scenario, variants, len(done)), report))
            _require_equal_outputs(a, b, done[-1])
        try:
            found = Comparison(
                scenario=scenario, design=design, parity=parity, artifacts=artifacts, sessions=tuple(done)
            )
        except ValidationError as error:
            raise MeasurementError(f"{a} against {b} on {target}: {explain(error)}") from None
        if found.looks == design.looks or not undecided(found):
            return found


def _require_equal_outputs(a: Path, b: Path, session: Session) -> None:
    ours, theirs = (session.variants[name].outputs for name in (A, B))
    if ours != theirs:
        raise ParityError(
            f"{a} and {b} cannot be compared: their outputs have the shapes {_shapes(ours)} and {_shapes(theirs)}"
        )


def _shapes(outputs: tuple[tuple[int, ...], ...]) -> list[list[int]]:
    return [list(shape) for shape in outputs]


def _show(signature: Signature) -> str:
    return ", ".join(
        f"{name} {spec.dtype}{list(spec.shape)}" for name, spec in zip(signature.names, signature.inputs, strict=True)
    )
