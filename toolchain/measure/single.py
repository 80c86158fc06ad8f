"""One artifact on one target: latency with its interval, tails, throughput, cold start and memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import model_validator

from toolchain.defaults import COLD_STARTS, LOOKS
from toolchain.devices.device import Device, device_for
from toolchain.errors import MeasurementError
from toolchain.measure.environment import machine_changes
from toolchain.measure.experiment import artifact_facts, plan_experiment
from toolchain.measure.intervals import Interval, median_interval, slot_medians
from toolchain.measure.sampled import Sampled, require_sessions
from toolchain.measure.samples import CONTROL, A, ArtifactFacts, ColdStart, Design, Workload
from toolchain.measure.session import cold_start_of, sessions_of
from toolchain.progress import SILENT, Progress
from toolchain.records import checked

SCHEMA = "slimvit.bench.run/1"
PAIR = (A, CONTROL)
"""The artifact, and the same loaded a second time: what the two differ by is noise."""


@dataclass(frozen=True)
class ColdMedians:
    """What an artifact costs a fresh process, as medians over some; None of memory that the system does not tell."""

    processes: int
    open_ms: float
    first_ms: float
    rss_before_bytes: float | None
    peak_rss_bytes: float | None
    device_bytes: float | None


def _median(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if len(known) == len(values) else None


class Measurement(Sampled):
    """One artifact: the design and the raw samples; every statistic is a property derived from them.

    Latency is of this machine in its state of that hour; only ratios that were measured side by side compare artifacts.

    Raises:
        ValidationError: the samples are not those that the design asks for, or come from different machines.
    """

    name: ClassVar[str] = SCHEMA

    artifact: ArtifactFacts
    cold: tuple[ColdStart, ...]

    @model_validator(mode="after")
    def _samples_fit_the_design(self) -> Measurement:
        numbers = [session.session for session in self.sessions]
        if numbers != list(range(self.design.sessions)):
            raise ValueError(f"expected sessions 0…{self.design.sessions - 1}, got {numbers}")
        require_sessions(self.sessions, self.design, self.scenario, PAIR)
        here = self.sessions[0].fingerprint.before
        if changes := machine_changes([here, *(start.fingerprint for start in self.cold)]):
            raise ValueError(f"the machine changed while it was measured: {'; '.join(changes)}")
        return self

    @cached_property
    def latency(self) -> Interval:
        """ln(milliseconds) of a call: the median of slot medians, with its bootstrap interval."""
        slots = [np.log(slot_medians(session.slots_ns(A)) / 1e6) for session in self.sessions]
        return median_interval(slots, alpha=self.design.alpha, seed=self.design.seed)

    @cached_property
    def control(self) -> Interval:
        """As its base, at the first look of a comparison."""
        return self.log_ratio(CONTROL, A, LOOKS)

    @property
    def cold_start(self) -> ColdMedians | None:
        """What fresh processes took; None where there were none."""
        if not self.cold:
            return None
        return ColdMedians(
            len(self.cold),
            statistics.median(start.open_ns for start in self.cold) / 1e6,
            statistics.median(start.first_ns for start in self.cold) / 1e6,
            _median([start.rss_before_bytes for start in self.cold]),
            _median([start.peak_rss_bytes for start in self.cold]),
            _median([start.device_bytes for start in self.cold]),
        )

    @property
    def samples_per_second(self) -> float:
        """Throughput at the median latency."""
        return 1e3 * self.scenario.batch / self.latency.to_ratio()["point"]

    @property
    def artifacts(self) -> dict[Literal["A"], ArtifactFacts]:
        return {A: self.artifact}

    @property
    def headline(self) -> str:
        shown = self.latency.to_ratio()
        return f"{shown['point']:.3f} ms [{shown['lo']:.3f}, {shown['hi']:.3f}]"

    def to_dict(self) -> dict[str, object]:
        """The JSON object of `bench run --json`: the statistics and, under `raw`, what they follow from."""
        latency = self.latency.to_ratio()
        return {
            "schema": SCHEMA,
            "artifact": self.artifact.name,
            "size_bytes": self.artifact.size_bytes,
            "latency_ms": latency,
            "p90_ms": self.tail_ms(A, 0.9),
            "p99_ms": self.tail_ms(A, 0.99),
            "samples_per_second": self.samples_per_second,
            "cold_start": None if self.cold_start is None else asdict(self.cold_start),
            "tau_min": self.tau_min,
            "sessions": len(self.sessions),
            "blocks": self.blocks,
            **self.sealed(),
        }


def measure(
    artifact: Path,
    target: str | Device = "ort-cpu",
    workload: Workload = Workload(),
    design: Design = Design(),
    *,
    cold_starts: int = COLD_STARTS,
    progress: Progress = SILENT,
) -> Measurement:
    """What one artifact costs on a target; the arguments and errors are those of `compare`, but one look is all it takes.

    Args:
        artifact: an ONNX file, or for "eager" a model folder.
        target: name of a target on this machine, or a device.
        workload: what a call is to be.
        design: how it is timed; each block holds two slots.
        cold_starts: fresh processes that open the artifact and call it once, before the sessions.
        progress: gets progress reports.
    """
    device = device_for(target)
    experiment = plan_experiment(device.runtime, workload, design.once, dict.fromkeys(PAIR, artifact))
    facts, starts = artifact_facts(artifact), list[ColdStart]()
    for index in range(cold_starts):
        progress.at(0.0, f"cold start {index + 1}/{cold_starts}")
        starts.append(cold_start_of(experiment, A, device.measurer, SILENT))
    sessions = tuple(sessions_of(experiment, device.measurer, progress))
    with checked(MeasurementError, f"{artifact} on {device.name}"):
        return Measurement(
            scenario=experiment.scenario,
            design=experiment.design,
            artifact=facts,
            sessions=sessions,
            cold=tuple(starts),
        )
