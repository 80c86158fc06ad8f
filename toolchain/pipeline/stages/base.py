"""The base class of stages, and the state of a run that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from toolchain.devices.device import Devices
from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.families import FAMILIES
from toolchain.measure.comparison import Comparison
from toolchain.model import AnyModel, DeployModel, Made, MaskedModel, SlicedModel, TimmModel
from toolchain.parity import require
from toolchain.pipeline.extensions import foreign_code
from toolchain.pipeline.folder import Done, Facts, Workspace, Written, step_key
from toolchain.pipeline.job import Job, code
from toolchain.pipeline.judge import Judge
from toolchain.pipeline.tools import Tools
from toolchain.progress import Progress
from toolchain.report.record import Figures
from toolchain.surgery.replay import load_model, save_model
from toolchain.version import tool

Compare = Callable[..., Comparison]
"""Times two artifacts, as `toolchain.compare` does."""
M = TypeVar("M", TimmModel, MaskedModel, SlicedModel, DeployModel)


@dataclass
class Run:
    """A run under way.

    Attributes:
        job: the recipe, looked at whole.
        space: the run's folder.
        devices: that it measures on.
        progress: gets progress reports.
        compare: what times two artifacts.
        done: name → stage that was carried out or taken up, in order.
        lost: devices that could not be measured on, and why.
        refused: stages whose workload their device refused, and why.
    """

    job: Job
    space: Workspace
    devices: Devices
    progress: Progress
    compare: Compare
    done: dict[str, Done[Any]] = field(default_factory=dict)
    lost: dict[str, TargetUnavailable] = field(default_factory=dict)
    refused: dict[str, TargetUnavailable] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.space.root

    @cached_property
    def judge(self) -> Judge:
        """The judge of the run's models and files."""
        job = self.job
        return Judge(job.source, job.dense.output, job.dense.module, job.labelled)

    def do(self, stage: RunStage[Facts]) -> Done[Facts]:
        """A stage, taken up from its record or carried out."""
        self.progress.watcher.stage(stage.name)
        key = stage.key
        done = self.space.step(
            stage.name, key, stage.facts, lambda: stage.work(key), settled=stage.settles, tools=Tools.now(code())
        )
        self.done[stage.name] = done
        self.progress.watcher.done(stage.name, done.seconds, reused=done.reused)
        return done

    def keep(self, stage: RunStage[Facts]) -> Done[Facts] | None:
        """A stage as an earlier run left it, if one did and its inputs are the same, because it cannot be done again now."""
        known = self.space.recorded(stage.name, stage.key, stage.facts)
        if known is not None:
            self.done[stage.name] = known
        return known

    def saved(self, name: str, model: AnyModel, folder: Path) -> Made[Written, Figures]:
        """A model that is written to a folder: its figures, and the rung of what is read back from there."""
        again = load_model(save_model(model, folder))
        rung = self.judge.modules(name, model.module, "reloaded", again.module)
        require([rung])
        return Made((folder,), self.judge.figures(again, folder), (rung,))


class RunStage(ABC, Generic[Facts]):
    """A stage of a run. Its outcome is in the folder: the next stage loads it from there, whether or not it was done now."""

    facts: type[Facts]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the stage in its record and on the screen."""

    @property
    @abstractmethod
    def inputs(self) -> Sequence[Any]:
        """JSON values of everything that the outcome depends on, except code."""

    @property
    def entries(self) -> Iterable[object]:
        """Entries of registries that take part, beside families: code of other packages counts as slimvit's own does."""
        return ()

    @property
    def key(self) -> str:
        """Digest of everything that the outcome depends on."""
        return stage_key(self.name, self.inputs, self.entries)

    @abstractmethod
    def work(self, key: str) -> Made[Written, Facts]:
        """What is written, found out and compared; `key` is that under which a stage may keep what it resumes from."""

    def settles(self, facts: Facts) -> bool:  # noqa: ARG002
        """Whether recorded facts answer the question, so that the work need not be done again."""
        return True


def stage_key(name: str, inputs: Sequence[Any], entries: Iterable[object] = ()) -> str:
    """Digest of everything that the outcome of a stage depends on: its inputs, slimvit's code, and that of entries of registries."""
    return step_key(name, f"{tool()} {code()}", [*inputs, foreign_code([*FAMILIES.values(), *entries])])


def open_as(folder: Path, kind: type[M]) -> M:
    """The model in a folder; raises ArtifactError if it is one of another stage."""
    model = load_model(folder)
    if not isinstance(model, kind):
        raise ArtifactError(f"{folder} holds a {model.stage} model; this stage takes a {kind.stage} one")
    return model
