"""Recomputes results from their raw samples; needs no hardware."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from pydantic import JsonValue, TypeAdapter

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, RecipeError
from toolchain.measure.environment import Fingerprint, Machine, machine_changes
from toolchain.measure.samples import ArtifactFacts, Scenario
from toolchain.measure.stored import Result, schema_of
from toolchain.on_device.runner import fingerprint
from toolchain.registry import Registry

RESULTS: Registry[type[Result]] = Registry(
    "kind of result",
    "slimvit.results",
    {
        "slimvit.bench/2": "toolchain.measure.comparison:Comparison",
        "slimvit.bench.run/1": "toolchain.measure.single:Measurement",
        "slimvit.floor/2": "toolchain.analysis.realised:Floor",
        "slimvit.bench.calibration/3": "toolchain.measure.calibration:Calibration",
        "slimvit.gate/2": "toolchain.gate.result:GateResult",
    },
)
"""By their schema."""


@runtime_checkable
class Measured(Protocol):
    """A result of one scenario, on one machine."""

    scenario: Scenario

    @property
    def artifacts(self) -> Mapping[str, ArtifactFacts]:
        """Which bytes were timed: "A", and where there are two "B"."""
        ...

    @property
    def environment(self) -> dict[str, JsonValue]:
        """The machine."""
        ...


def verify(path: Path, *, a: Path | None = None, b: Path | None = None, here: bool = False) -> Result:
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
    if schema not in RESULTS:
        raise ArtifactError(f"{path} has schema {schema or 'none'!r}; verified are {', '.join(map(repr, RESULTS))}")
    result = RESULTS[schema].load(path)
    files = {"A": a, "B": b}
    if not isinstance(result, Measured):
        if here or any(files.values()):
            raise RecipeError(f"{path} is the result of several artifacts; leave --a, --b and --here out")
        return result
    for name, file in files.items():
        if file is None:
            continue
        if name not in result.artifacts:
            raise RecipeError(f"{path} is the result of one artifact; leave --b out")
        facts, artifact = result.artifacts[name], open_artifact(file)
        if artifact.sha256 != facts.sha256:
            raise ArtifactError(
                f"{path} is not of {file}: it timed {facts.name} ({facts.size_bytes:,} bytes, sha256 "
                f"{facts.sha256[:12]}…), the file has {artifact.size_bytes:,} bytes, sha256 {artifact.sha256[:12]}…"
            )
    if here:
        _require_here(path, result)
    return result


def _require_here(path: Path, result: Measured) -> None:
    there, affinity = result.environment, result.scenario.affinity
    mine = TypeAdapter(dict[str, JsonValue]).validate_python(fingerprint(result.scenario.threads)["machine"])
    mine["runtimes"] = there.get("runtimes")
    if affinity is not None and set(affinity) <= set(Machine.model_validate(mine).affinity or ()):
        mine["affinity"] = there.get("affinity")  # the cores that the sessions were pinned to can be used here
    if changes := machine_changes([Fingerprint(machine=machine, state={}) for machine in (there, mine)]):
        raise ArtifactError(f"{path} was measured on another machine: {'; '.join(changes)}")
