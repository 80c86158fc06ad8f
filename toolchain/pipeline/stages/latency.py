"""`latency.<target>.json`: the measured latency table of the dense model on a target of the budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.cost import LatencyTable
from toolchain.devices.device import Devices
from toolchain.files import write_text
from toolchain.measure.experiment import workload_on
from toolchain.model import Made, TimmModel
from toolchain.pipeline.folder import Nothing, Written
from toolchain.pipeline.job import Job
from toolchain.pipeline.latency_budget import Clock, Setting
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.progress import Progress
from toolchain.targets import get_target


@dataclass(frozen=True)
class Table(RunStage[Nothing]):
    """The table of one clock: from the run's folder or the user's cache, or measured."""

    run: Run
    clock: Clock
    facts = Nothing

    @property
    def name(self) -> str:
        return f"latency-{self.clock.setting.target}"

    @property
    def inputs(self) -> Sequence[Any]:
        return [self.clock.key]

    @property
    def entries(self) -> Iterable[object]:
        return (get_target(self.clock.setting.device.runtime),)

    def work(self, key: str) -> Made[Written, Nothing]:  # noqa: ARG002
        if not self.run.space.resume:
            self.clock.forget()
        write_text(self.path, self.clock.table().to_json())
        return Made((self.path,), Nothing())

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.run.root / f"latency.{self.clock.setting.target}.json"

    def table(self) -> LatencyTable:
        """The table that lies there."""
        return LatencyTable.from_json(self.path.read_text(encoding="utf-8"))


def clocks(job: Job, dense: TimmModel, devices: Devices, progress: Progress) -> list[Clock]:
    """What times the widths of a dense model: one clock for each target or device on which the budget limits latency.

    Batch and threads are the first of [bench]; without one, 1 and what targets.toml says of the device. In the block of
    `devices`, sessions that an earlier run finished are taken up.
    """
    recipe = job.recipe
    batch, threads = (recipe.bench.batch[0], recipe.bench.threads[0]) if recipe.bench else (1, None)
    choices, export = job.problem.choices, recipe.export
    timers = []
    for target in recipe.budget.latency:
        device = devices.get(target)
        setting = Setting(device, workload_on(device, batch=batch, threads=threads), export.opset, export.simplify)
        timers.append(Clock(dense, choices, setting, progress))
    return timers
