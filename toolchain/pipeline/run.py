"""A recipe's stages in order, each checked, recorded, and taken up again where a killed run stopped."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.compress.stage import pruned_shares
from toolchain.cost import LatencyTable, Widths
from toolchain.errors import ArtifactError, StorageError
from toolchain.files import exclusive, sha256, write_json, write_text
from toolchain.measure.samples import Design
from toolchain.model import MaskedModel, TimmModel, run_stage
from toolchain.parity import require
from toolchain.pipeline.folder import Workspace
from toolchain.pipeline.job import (
    baseline_folder,
    clocks,
    compressed,
    dense_inputs,
    prepare,
    tool,
    trained,
    trains,
)
from toolchain.pipeline.judge import require_cost
from toolchain.pipeline.latency_budget import Clock, latency_of
from toolchain.pipeline.shipping import measured_on, ship
from toolchain.pipeline.steps import MODEL_FILES, Found, Steps, open_as
from toolchain.progress import SILENT, Progress
from toolchain.recipe import Recipe
from toolchain.report.assemble import assemble
from toolchain.report.files import write_report
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.processes import require_one
from toolchain.training.stages import Finetune

log = logging.getLogger(__name__)


def run(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    resume: bool = True,
    design: Design = Design(),
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The content of report.json, after carrying out a recipe in the folder `out`.

    Args:
        recipe: a recipe, or the path of a recipe.toml.
        out: the folder; it is created, and a run that was interrupted there is taken up again.
        resume: False does every stage anew.
        design: how the latencies of [bench] are timed.
        progress: told how far the run is.

    Raises:
        RecipeError: among others, several processes were started, as by `torchrun`; the message says what to do.
        TargetUnavailable: a target of the recipe is not there, before any work; or a device dropped off, or is off while
            the run is taken up again: then everything else was done, and the report says what was not measured.
        SlimvitError: see `toolchain.errors`; what was finished before stays and is reused by the next run.
    """
    require_one("a whole recipe")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(Path(recipe))
    workspace = Workspace(Path(out).resolve(), resume=resume)
    workspace.check()
    job = prepare(recipe, met=measured_on(workspace, recipe))
    with workspace.open() as space:
        return _Run(job, space, progress, design).all()


@dataclass
class _Run(Steps):
    def all(self) -> dict[str, Any]:
        """Every stage of the recipe; returns the report."""
        root, recipe = self.space.root, self.job.recipe
        dense = self._dense()
        masked, masked_folder = self._compress(dense)
        if recipe.finetune.epochs and not self.job.source.synthetic:
            masked, masked_folder = self._finetune(dense, masked)
        self._deploy(masked, masked_folder)
        ship(self)
        facts = {name: {**done.facts, "seconds": done.seconds} for name, done in self.stages.items()}
        self.space.forget_all_but(self.stages)
        files = [root / name for done in self.stages.values() for name in done.outputs]
        lost = {name: str(error) for name, error in self.lost.items()}
        output = self.job.dense.output
        report = assemble(recipe, tool(), facts, masked.plan, files, root, self.job.source, output, lost)
        write_report(report, files, root)
        for error in self.lost.values():
            raise error
        return report

    # The stages. Each loads what the one before wrote, so a run that resumes takes the same path as one that does not.

    def _dense(self) -> TimmModel:
        folder = self.space.root / "dense"

        def work(key: str) -> Found:
            model = self._baseline(key) if trains(self.job) else self.job.dense
            return [folder], self.saved("dense", model, folder)

        self.step("dense", dense_inputs(self.job), work)
        return open_as(folder, TimmModel)

    def _baseline(self, key: str) -> TimmModel:
        """The trained dense model: from the user's cache, or trained and left there for other recipes."""
        cached = baseline_folder(self.job)
        with exclusive(cached):
            if self.space.resume:
                with contextlib.suppress(ArtifactError, StorageError):
                    model = open_as(cached, TimmModel)
                    log.info("the baseline was trained before; taken from %s", cached)
                    return model
            model = trained(self.job, self.space.scratch("dense"), key, self.progress)
            save_model(model, cached)
            return model

    def _compress(self, dense: TimmModel) -> tuple[MaskedModel, Path]:
        job, root = self.job, self.space.root
        folder = root / "masked"
        timers = clocks(job, dense, self.progress)
        tables = [self._table(timer) for timer in timers]
        inputs = [
            sha256(root / "dense" / "model.safetensors"),
            sha256(root / "dense" / "model.json"),
            job.recipe.compress.model_dump(mode="json"),
            job.recipe.budget.model_dump(mode="json"),
            dict(job.multiples),
            job.source.digest,
            [table.model_dump(mode="json") for table in tables],
        ]

        def work(key: str) -> Found:
            masked, allocation = compressed(
                job,
                replace(dense, provenance={**dense.provenance, "weights_sha256": inputs[0]}),
                latency_of(timers, tables),
                checkpoint=self.space.scratch("compress"),
                key=key,
                progress=self.progress,
            )
            found = allocation.to_dict()
            write_json(root / "allocation.json", found)
            write_text(root / "plan.json", masked.plan.to_json())
            facts = {
                **self.saved("masked", masked, folder),
                "pruned_shares": pruned_shares(masked),
                "latency": found["latency"],
                "limits": dense.family.limits(dense.module),
            }
            return [root / "allocation.json", root / "plan.json", folder], facts

        self.step("compress", inputs, work)
        return open_as(folder, MaskedModel), folder

    def _table(self, clock: Clock) -> LatencyTable:
        """What the widths of one target cost: from the run's folder or the user's cache, or measured."""
        path = self.space.root / f"latency.{clock.setting.target}.json"

        def work(_: str) -> Found:
            if not self.space.resume:
                clock.forget()
            write_text(path, clock.table().to_json())
            return [path], {}

        self.step(f"latency-{clock.setting.target}", clock.key, work)
        return LatencyTable.from_json(path.read_text(encoding="utf-8"))

    def _finetune(self, dense: TimmModel, masked: MaskedModel) -> tuple[MaskedModel, Path]:
        job, root = self.job, self.space.root
        folder, section = root / "finetuned", job.recipe.finetune
        weights = [sha256(root / name / file) for name in ("dense", "masked") for file in MODEL_FILES]
        inputs = [weights, section.model_dump(mode="json"), job.source.digest, job.recipe.compress.seed]

        def work(key: str) -> Found:
            scratch, seed = self.space.scratch("finetune"), job.recipe.compress.seed
            stage = Finetune(section, job.source, dense, seed, scratch, key, self.progress)
            made = run_stage(stage, masked)
            return [folder], {
                **self.saved("finetuned", made.artifact, folder),
                "found": made.facts.model_dump(mode="json"),
            }

        self.step("finetune", inputs, work)
        return open_as(folder, MaskedModel), folder

    def _deploy(self, masked: MaskedModel, before: Path) -> None:
        folder = self.space.root / "deploy"

        def work(_: str) -> Found:
            sliced = run_stage(Slice(), masked).artifact
            deploy = run_stage(Split(), sliced).artifact
            require_cost(deploy, self.job.allocation.dense.shrunk(Widths.of(masked.plan), masked.groups))
            again = load_model(save_model(deploy, folder))
            rungs = [
                self.judge.modules("masked", masked.module, "sliced", sliced.module),
                self.judge.modules("sliced", sliced.module, "split", deploy.module),
                self.judge.modules("split", deploy.module, "deploy", again.module),
            ]
            require(rungs)
            facts = {"sliced": self.judge.figures(sliced), **self.judge.figures(deploy, folder)}
            return [folder], {**facts, "parity": [rung.to_dict() for rung in rungs]}

        inputs = [[sha256(before / file) for file in MODEL_FILES], self.job.source.digest]
        self.step("deploy", inputs, work)
