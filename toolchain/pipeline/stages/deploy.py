"""`deploy/`: the masked model sliced and split, the form that ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.cost import Widths
from toolchain.files import sha256
from toolchain.model import Made, MaskedModel, run_stage
from toolchain.parity import require
from toolchain.pipeline.folder import Written
from toolchain.pipeline.judge import require_cost
from toolchain.pipeline.stages.base import Run, RunStage
from toolchain.records import Record
from toolchain.report.record import Figures
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

WEIGHTS_AND_RECORD = ("model.safetensors", "model.json")


class DeployFacts(Record):
    """Figures of the sliced model, which is not kept, and of the one that ships."""

    sliced: Figures
    deploy: Figures


@dataclass(frozen=True)
class Deploy(RunStage[DeployFacts]):
    """The model of stock modules only, made of the masked one that lies in the folder `before`."""

    run: Run
    masked: MaskedModel
    before: Path
    name = "deploy"
    facts = DeployFacts

    @property
    def inputs(self) -> Sequence[Any]:
        return [[sha256(self.before / file) for file in WEIGHTS_AND_RECORD], self.run.job.source.digest]

    def work(self, key: str) -> Made[Written, DeployFacts]:  # noqa: ARG002
        masked, judge, folder = self.masked, self.run.judge, self.run.root / "deploy"
        sliced = run_stage(Slice(), masked).artifact
        deploy = run_stage(Split(), sliced).artifact
        require_cost(deploy, self.run.job.problem.costs.shape(Widths.of(masked.plan)))
        again = load_model(save_model(deploy, folder))
        rungs = (
            judge.modules("masked", masked.module, "sliced", sliced.module),
            judge.modules("sliced", sliced.module, "split", deploy.module),
            judge.modules("split", deploy.module, "deploy", again.module),
        )
        require(rungs)
        return Made((folder,), DeployFacts(sliced=judge.figures(sliced), deploy=judge.figures(deploy, folder)), rungs)
