"""Results recomputed from their raw samples: what a sceptic runs, without the hardware."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toolchain.analysis import realised
from toolchain.analysis.realised import Floor
from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, RecipeError
from toolchain.gate import result as gate
from toolchain.gate.result import GateResult
from toolchain.measure import calibration as calibrate
from toolchain.measure import comparison as protocol
from toolchain.measure import single
from toolchain.measure.calibration import Calibration
from toolchain.measure.comparison import Comparison
from toolchain.measure.environment import Fingerprint, machine_changes
from toolchain.measure.single import Measurement
from toolchain.measure.stored import schema_of
from toolchain.on_device.runner import fingerprint

Measured = Comparison | Measurement | Floor | Calibration
LOADERS: dict[str, Callable[[Path], Measured | GateResult]] = {
    protocol.SCHEMA: Comparison.load,
    single.SCHEMA: Measurement.load,
    realised.SCHEMA: Floor.load,
    calibrate.SCHEMA: Calibration.load,
    gate.SCHEMA: GateResult.load,
}


def verify(path: Path, *, a: Path | None = None, b: Path | None = None, here: bool = False) -> Measured | GateResult:
    """The result in a file, every statistic in it recomputed from its samples.

    Args:
        path: what `bench run`, `compare`, `floor` or `calibrate` wrote, or `gate --json`.
        a: the artifact that was timed as A, or alone; its bytes must have the recorded digest.
        b: the artifact that was timed as B.
        here: require the machine to be this one, but for the runtimes that this process has not loaded.

    Raises:
        StorageError: a file cannot be read.
        ArtifactError: the file was altered or cut, is no result, or is of other artifacts or another machine.
        RecipeError: `b` was given for the result of one artifact, or any of them for that of many.
    """
    schema = schema_of(path)
    if schema not in LOADERS:
        raise ArtifactError(f"{path} has schema {schema or 'none'!r}; verified are {', '.join(map(repr, LOADERS))}")
    found = LOADERS[schema](path)
    if isinstance(found, GateResult):
        if here or a is not None or b is not None:
            raise RecipeError(f"{path} is the result of several artifacts; leave --a, --b and --here out")
        return found
    recorded = {str(name): facts for name, facts in found.artifacts.items()}
    for name, file in (("A", a), ("B", b)):
        if file is None:
            continue
        if name not in recorded:
            raise RecipeError(f"{path} is the result of one artifact; leave --b out")
        facts, artifact = recorded[name], open_artifact(file)
        if artifact.sha256 != facts.sha256:
            raise ArtifactError(
                f"{path} is not of {file}: it timed {facts.name} ({facts.size_bytes:,} bytes, sha256 "
                f"{facts.sha256[:12]}…), the file has {artifact.size_bytes:,} bytes, sha256 {artifact.sha256[:12]}…"
            )
    if here:
        _require_here(path, found)
    return found


def _require_here(path: Path, found: Measured) -> None:
    there = found.environment
    mine = {**fingerprint(found.scenario.threads)["machine"], "runtimes": there.get("runtimes")}
    if found.scenario.affinity is not None and set(found.scenario.affinity) <= set(mine["affinity"] or ()):
        mine["affinity"] = there.get("affinity")  # the cores that the sessions were pinned to can be used here
    prints = [Fingerprint(machine=machine, state={}) for machine in (there, mine)]
    if changes := machine_changes(prints):
        raise ArtifactError(f"{path} was measured on another machine: {'; '.join(changes)}")
