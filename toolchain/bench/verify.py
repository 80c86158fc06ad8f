"""Results recomputed from their raw samples: what a sceptic runs, without the hardware."""

from __future__ import annotations

from pathlib import Path

from toolchain.bench import protocol, single
from toolchain.bench.environment import Fingerprint, machine_changes
from toolchain.bench.plan import artifact_facts
from toolchain.bench.protocol import Comparison
from toolchain.bench.samples import ArtifactFacts
from toolchain.bench.single import Measurement
from toolchain.bench.stored import schema_of
from toolchain.errors import ArtifactError, RecipeError
from toolchain.targets.device_runner import fingerprint


def verify(path: Path, *, a: Path | None = None, b: Path | None = None, here: bool = False) -> Comparison | Measurement:
    """The result in a file, every statistic in it recomputed from its samples.

    Args:
        path: what `bench run` or `bench compare` wrote.
        a: the artifact that was timed as A, or alone; its bytes must have the recorded digest.
        b: the artifact that was timed as B.
        here: require the machine to be this one, but for the runtimes that this process has not loaded.

    Raises:
        StorageError: a file cannot be read.
        ArtifactError: the file was altered or cut, is no result, or is of other artifacts or another machine.
        RecipeError: `b` was given for the result of one artifact.
    """
    found: Comparison | Measurement
    if schema_of(path) == single.SCHEMA:
        if b is not None:
            raise RecipeError(f"{path} is the result of one artifact; leave --b out")
        found = Measurement.load(path)
        recorded: list[tuple[Path | None, ArtifactFacts]] = [(a, found.artifact)]
    elif schema_of(path) == protocol.SCHEMA:
        found = Comparison.load(path)
        recorded = [(a, found.artifacts["A"]), (b, found.artifacts["B"])]
    else:
        raise ArtifactError(
            f"{path} has schema {schema_of(path) or 'none'!r}; verified are {protocol.SCHEMA!r} and {single.SCHEMA!r}"
        )
    for file, facts in recorded:
        if file is not None and (now := artifact_facts(file)).sha256 != facts.sha256:
            raise ArtifactError(
                f"{path} is not of {file}: it timed {facts.name} ({facts.size_bytes:,} bytes, sha256 "
                f"{facts.sha256[:12]}…), the file has {now.size_bytes:,} bytes, sha256 {now.sha256[:12]}…"
            )
    if here:
        _require_here(path, found)
    return found


def _require_here(path: Path, found: Comparison | Measurement) -> None:
    there = found.environment
    mine = {**fingerprint(found.scenario.threads)["machine"], "runtimes": there.get("runtimes")}
    if found.scenario.affinity is not None and set(found.scenario.affinity) <= set(mine["affinity"] or ()):
        mine["affinity"] = there.get("affinity")  # the cores that the sessions were pinned to can be used here
    prints = [Fingerprint(machine=machine, state={}) for machine in (there, mine)]
    if changes := machine_changes(prints):
        raise ArtifactError(f"{path} was measured on another machine: {'; '.join(changes)}")
