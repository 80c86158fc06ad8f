"""What is timed side by side, planned apart from being run: variants under a scenario and a design, and their schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.artifacts import ARTIFACTS, InputSpec, Signature, open_artifact
from toolchain.devices.device import Device
from toolchain.errors import RecipeError, TargetUnavailable
from toolchain.measure.samples import ArtifactFacts, Design, Scenario, Workload
from toolchain.on_device.runner import COLD_SCHEDULE_SCHEMA, SCHEDULE_SCHEMA, Inputs, Schedule, Tensor, VariantSchedule
from toolchain.records import checked
from toolchain.targets import get_target

INPUT_SETS = 8


@dataclass(frozen=True)
class TimedArtifact:
    """An artifact of a session: where it lies, what opens it, and what it is fed."""

    path: Path
    runtime: str
    signature: Signature


@dataclass(frozen=True)
class Experiment:
    """What is timed, how, and the variants that take turns in every session."""

    scenario: Scenario
    design: Design
    variants: Mapping[str, TimedArtifact]

    def schedule(self, session: int) -> Schedule:
        """What the device runner needs for one session, by its number over all looks."""
        design = self.design
        return {
            "schema": SCHEDULE_SCHEMA,
            "seed": design.seed,
            "session": session,
            "blocks": design.blocks_of(session),
            "slot_ms": design.slot_ms,
            "threads": self.scenario.threads,
            "affinity": self.scenario.affinity,
            "warmup": {"calls": design.warmup_calls, "seconds": design.warmup_s},
            "inputs": inputs_of(self.scenario.inputs, design.seed),
            "variants": [self._variant(name) for name in self.variants],
        }

    def cold_schedule(self, name: str) -> Schedule:
        """What the device runner needs for one cold start of a variant."""
        return {
            "schema": COLD_SCHEDULE_SCHEMA,
            "threads": self.scenario.threads,
            "affinity": self.scenario.affinity,
            "inputs": inputs_of(self.scenario.inputs, self.design.seed, 1),
            "variants": [self._variant(name)],
        }

    def _variant(self, name: str) -> VariantSchedule:
        variant = self.variants[name]
        names, inputs = variant.signature.names, variant.signature.inputs
        told: VariantSchedule = {
            "name": name,
            "path": str(variant.path.absolute()),
            "runtime": variant.runtime,
            "inputs": list(names),
        }
        return told if inputs == self.scenario.inputs else {**told, "dtypes": [spec.dtype for spec in inputs]}


def inputs_of(tensors: Sequence[InputSpec], seed: int, count: int = INPUT_SETS) -> Inputs:
    """The input sets that a device generates."""
    described: list[Tensor] = [{"shape": list(spec.shape), "dtype": spec.dtype} for spec in tensors]
    return {"count": count, "seed": seed, "tensors": described}


def plan_experiment(runtime: str, workload: Workload, design: Design, artifacts: Mapping[str, Path]) -> Experiment:
    """Artifacts on one runtime, fed with what the first of them takes.

    Raises:
        TargetUnavailable: nothing can be timed on the runtime.
        RecipeError: a number is out of range, or does not fit an artifact or the runtime.
        StorageError, ArtifactError: an artifact cannot be read, or is damaged.
    """
    require_target(runtime, list(artifacts.values()))
    require_threads(runtime, (workload.threads,))
    shape = workload.input_shape
    signatures = {p: open_artifact(p).signature(workload.batch, shape) for p in dict.fromkeys(artifacts.values())}
    scenario = scenario_of(runtime, workload, next(iter(signatures.values())).inputs)
    return Experiment(scenario, design, {n: TimedArtifact(p, runtime, signatures[p]) for n, p in artifacts.items()})


def scenario_of(runtime: str, workload: Workload, inputs: tuple[InputSpec, ...]) -> Scenario:
    """The scenario of a workload on a runtime; raises RecipeError for a number that is out of range."""
    with checked(RecipeError, "cannot measure"):
        return Scenario(
            target=runtime,
            threads=workload.threads,
            batch=workload.batch,
            inputs=inputs,
            affinity=workload.affinity,
        )


def workload_on(
    device: Device,
    *,
    batch: int = 1,
    threads: int | None = None,
    affinity: tuple[int, ...] | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> Workload:
    """A workload with the threads and cores that a device has by itself, where no others are named."""
    return Workload(batch, threads or device.threads, affinity or device.affinity, input_shape)


def require_target(target: str, paths: Sequence[Path]) -> None:
    """Raises TargetUnavailable if nothing can be timed on a target, RecipeError if it takes other artifacts."""
    where = get_target(target)
    if not where.measures:
        why = f": {where.never_run}" if where.never_run else ""
        raise TargetUnavailable(target, f"it builds engines but latency cannot be measured on it{why}")
    where.require_run()
    words = " and ".join(f"{ARTIFACTS[kind].word}s" for kind in where.takes)
    for artifact in map(open_artifact, paths):
        if artifact.name not in where.takes:
            raise RecipeError(f"target {target!r} takes {words}, got {artifact.path}")


def require_threads(target: str, threads: Sequence[int]) -> None:
    """Raises RecipeError if threads of the CPU are asked for where a GPU does the work: the result would name them."""
    if not get_target(target).uses_threads and any(count != 1 for count in threads):
        raise RecipeError(f"target {target!r} runs on a GPU, where threads mean nothing; leave them at 1")


def artifact_facts(path: Path) -> ArtifactFacts:
    """Name, bytes and digest of an artifact."""
    artifact = open_artifact(path)
    return ArtifactFacts(name=path.name, size_bytes=artifact.size_bytes, sha256=artifact.sha256)
