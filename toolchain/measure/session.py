"""Runs the sessions of an experiment one after another, each in a fresh process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TypeVar

from toolchain.devices.transport import Measurer
from toolchain.errors import MeasurementError
from toolchain.measure.experiment import Experiment
from toolchain.measure.samples import ColdStart, Session
from toolchain.on_device.runner import Samples
from toolchain.progress import Progress
from toolchain.records import Record, checked

R = TypeVar("R", bound=Record)


def sessions_of(experiment: Experiment, measurer: Measurer, progress: Progress) -> Iterator[Session]:
    """The sessions of an experiment in order, each measured when it is asked for, up to the design's last look.

    Raises:
        SlimvitError: as `Measurer.run`; a MeasurementError also for what is no session.
    """
    design = experiment.design
    for index in range(design.sessions * design.looks):
        label = ", ".join(filter(None, [progress.label, f"session {index + 1}"]))
        part = progress.part(design.share(index), design.share(index + 1), label)
        yield _read(Session, measurer.run(experiment.schedule(index), part), f"session {index}")


def cold_start_of(experiment: Experiment, name: str, measurer: Measurer, progress: Progress) -> ColdStart:
    """One cold start of a variant; raises as `sessions_of`."""
    return _read(ColdStart, measurer.run(experiment.cold_schedule(name), progress), "a cold start")


def _read(kind: type[R], samples: Samples, what: str) -> R:
    with checked(MeasurementError, what):
        return kind.model_validate_json(json.dumps(samples))
