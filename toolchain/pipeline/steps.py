"""What every stage of a run shares: the job, the folder, who is told, and what the stages before found out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.measure.samples import Design
from toolchain.model import AnyModel, DeployModel, MaskedModel, TimmModel
from toolchain.parity import require
from toolchain.pipeline.folder import Done, Workspace
from toolchain.pipeline.job import Job, step_key
from toolchain.pipeline.judge import Judge
from toolchain.progress import Progress
from toolchain.surgery.replay import load_model, save_model

MODEL_FILES = ("model.safetensors", "model.json")
M = TypeVar("M", TimmModel, MaskedModel, DeployModel)
Found = tuple[Iterable[Path], dict[str, Any]]
"""What a stage wrote, and its facts."""


@dataclass
class Steps:
    """A run under way.

    Attributes:
        job: the recipe, looked at whole.
        space: the run's folder.
        progress: who is told.
        design: how latency is timed.
        stages: name → what was done, in order.
        lost: devices that could not be measured on, and why.
    """

    job: Job
    space: Workspace
    progress: Progress
    design: Design = Design()
    stages: dict[str, Done] = field(default_factory=dict)
    lost: dict[str, TargetUnavailable] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The run's folder."""
        return self.space.root

    @cached_property
    def judge(self) -> Judge:
        """What is asked about the forms of the model."""
        return Judge(self.job.source, self.job.dense.output, self.job.dense.module)

    def step(
        self,
        name: str,
        inputs: Any,
        work: Callable[[str], Found],
        settled: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    ) -> Done:
        """A step, reused or carried out; `work` receives its key, under which it may keep what it resumes from."""
        self.progress.watcher.stage(name)
        key = step_key(name, inputs)
        done = self.space.step(name, key, lambda: work(key), settled=settled)
        self.stages[name] = done
        self.progress.watcher.done(name, done.seconds, reused=done.reused)
        return done

    def keep(self, name: str, inputs: Any) -> None:
        """A step as an earlier run left it, if one did and its inputs are the same, because it cannot be done again now."""
        if (known := self.space.recorded(name, step_key(name, inputs))) is not None:
            self.stages[name] = known

    def saved(self, name: str, model: AnyModel, folder: Path) -> dict[str, Any]:
        """Figures of a model that is now in a folder, and the rung of what is read back from there."""
        again = load_model(save_model(model, folder))
        rung = self.judge.modules(name, model.module, "reloaded", again.module)
        require([rung])
        return {**self.judge.figures(again, folder), "parity": [rung.to_dict()]}


def open_as(folder: Path, kind: type[M]) -> M:
    """The model in a folder; raises ArtifactError if it is one of another stage."""
    model = load_model(folder)
    if not isinstance(model, kind):
        raise ArtifactError(f"{folder} holds a {model.stage} model, expected a {kind.stage} one")
    return model
