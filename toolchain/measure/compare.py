"""Compares two artifacts on one target: checks their inputs and outputs, runs paired sessions until they decide, gives a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from toolchain.artifacts import Signature
from toolchain.devices.device import Device, device_for
from toolchain.devices.transport import Measurer
from toolchain.errors import MeasurementError, ParityError
from toolchain.measure.comparison import Comparison, Undecided, without_verdict
from toolchain.measure.experiment import Experiment, artifact_facts, plan_experiment
from toolchain.measure.samples import CONTROL, A, ArtifactFacts, B, Design, Parity, Session, Workload
from toolchain.measure.session import sessions_of
from toolchain.progress import SILENT, Progress
from toolchain.records import checked


@dataclass(frozen=True)
class Trial(Experiment):
    """A comparison that was planned: B and A and A once more, what is known of both, and what is made of their sessions."""

    artifacts: dict[Literal["A", "B"], ArtifactFacts]
    parity: Parity

    def run(
        self, measurer: Measurer, undecided: Undecided = without_verdict, progress: Progress = SILENT
    ) -> Comparison:
        """Its comparison, from as many looks as it takes; arguments and errors as `compare`."""
        sessions = list[Session]()
        for session in sessions_of(self, measurer, progress):
            sessions.append(session)
            self._require_equal_outputs(session)
            if len(sessions) % self.design.sessions == 0:
                comparison = self.comparison(sessions)
                if comparison.looks == self.design.looks or not undecided(comparison):
                    break
        return comparison

    def comparison(self, sessions: Sequence[Session]) -> Comparison:
        """What the sessions of one or more whole looks say; raises MeasurementError if they do not belong together."""
        with checked(MeasurementError, f"{self._names()} on {self.scenario.target}"):
            return Comparison(
                scenario=self.scenario,
                design=self.design,
                parity=self.parity,
                artifacts=self.artifacts,
                sessions=tuple(sessions),
            )

    def _require_equal_outputs(self, session: Session) -> None:
        ours, theirs = ([list(shape) for shape in session.variants[name].outputs] for name in (A, B))
        if ours != theirs:
            raise ParityError(
                f"{self._names('and')} cannot be compared: their outputs have the shapes {ours} and {theirs}"
            )

    def _names(self, word: str = "against") -> str:
        return f"{self.variants[A].path} {word} {self.variants[B].path}"


def plan_comparison(
    a: Path, b: Path, runtime: str, workload: Workload, design: Design, parity: Parity = "not claimed"
) -> Trial:
    """A comparison, planned and not run; arguments and errors as `compare`."""
    plan = plan_experiment(runtime, workload, design, {A: a, B: b, CONTROL: a})
    ours, theirs = (plan.variants[name].signature for name in (A, B))
    if not ours.fits(theirs):
        raise ParityError(f"{a} and {b} cannot be compared: their inputs are {_show(ours)} and {_show(theirs)}")
    artifacts: dict[Literal["A", "B"], ArtifactFacts] = {A: artifact_facts(a), B: artifact_facts(b)}
    return Trial(plan.scenario, plan.design, plan.variants, artifacts, parity)


def compare(
    a: Path | str,
    b: Path | str,
    target: str | Device = "ort-cpu",
    workload: Workload = Workload(),
    design: Design = Design(),
    *,
    parity: Parity = "not claimed",
    undecided: Undecided = without_verdict,
    progress: Progress = SILENT,
) -> Comparison:
    """B timed against A, interleaved with A itself as control, each session in a fresh process.

    While the verdict is open, and looks are left, the samples are doubled. Every look is judged at confidence 1 − 5 %/looks, so
    that repeated looks do not raise the chance of a false verdict.

    Args:
        a: the baseline: an ONNX file, or for "eager" a model folder.
        b: what is compared with it.
        target: name of a target on this machine, or a device as `toolchain.devices.device.open_device` gives one: it keeps
            finished sessions for the next run, should this one be cut off.
        workload: what a call is to be.
        design: how it is timed and judged.
        parity: what the caller has proven about B and A.
        undecided: whether a look leaves open what the caller wants to know; the verdict is wanted if nothing is said.
        progress: gets progress reports; the share jumps to the end if fewer looks sufficed.

    Raises:
        RecipeError: a number is out of range or does not fit the artifacts.
        StorageError: an artifact cannot be read.
        ArtifactError: an artifact is damaged, cannot be opened, or gives outputs that are not finite.
        ParityError: A and B differ in their inputs, or in the shape of their outputs.
        TargetUnavailable: the target is not there, or cannot be timed.
        MeasurementError: a session failed, or the machine changed between sessions.
    """
    device = device_for(target)
    trial = plan_comparison(Path(a), Path(b), device.runtime, workload, design, parity)
    return trial.run(device.measurer, undecided, progress)


def _show(signature: Signature) -> str:
    return ", ".join(
        f"{name} {spec.dtype}{list(spec.shape)}" for name, spec in zip(signature.names, signature.inputs, strict=True)
    )
