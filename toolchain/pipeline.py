"""A recipe's stages in order, each checked, recorded, and taken up again where a killed run stopped."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from toolchain.artifact import (
    AnyModel,
    DeployModel,
    MaskedModel,
    OnnxArtifact,
    TimmModel,
    run_stage,
    sha256,
    write_json,
    write_text,
)
from toolchain.bench.cell import cell_facts, conclusive, conditions_of, runtime
from toolchain.bench.compare import compare as bench_compare
from toolchain.bench.device import Device, Devices
from toolchain.bench.latency import Clock, latency_of
from toolchain.bench.samples import Parity
from toolchain.cache import Done, Workspace, exclusive, files_below
from toolchain.compress.stage import pruned_shares
from toolchain.cost import LatencyTable, Widths
from toolchain.errors import ArtifactError, StorageError
from toolchain.export.engine import BuildEngine
from toolchain.export.parity import require
from toolchain.export.stage import Export, graph_dict
from toolchain.job import (
    Job,
    baseline_folder,
    clocks,
    compressed,
    dense_inputs,
    prepare,
    step_key,
    tool,
    trained,
    trains,
)
from toolchain.judge import Judge, require_cost
from toolchain.listener import Listener, Silent, on_epoch
from toolchain.recipe import Recipe
from toolchain.report.assemble import assemble
from toolchain.report.files import write_report
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.processes import require_one
from toolchain.training.stages import Finetune

log = logging.getLogger(__name__)
MODEL_FILES = ("model.safetensors", "model.json")
M = TypeVar("M", TimmModel, MaskedModel, DeployModel)
Found = tuple[Iterable[Path], dict[str, Any]]


def run(
    recipe: Recipe | Path | str, out: Path | str, *, resume: bool = True, listener: Listener | None = None
) -> dict[str, Any]:
    """The content of report.json, after carrying out a recipe in the folder `out`.

    Args:
        recipe: a recipe, or the path of a recipe.toml.
        out: the folder; it is created, and a run that was interrupted there is taken up again.
        resume: False does every stage anew.
        listener: told about progress.

    Raises:
        RecipeError: among others, several processes were started, as by `torchrun`; the message says what to do.
        SlimvitError: see `toolchain.errors`; what was finished before stays and is reused by the next run.
    """
    require_one("a whole recipe")
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(Path(recipe))
    workspace = Workspace(Path(out).resolve(), resume=resume)
    workspace.check()
    job = prepare(recipe)
    with workspace.open() as space:
        return _Run(job, space, listener or Silent()).all()


@dataclass
class _Run:
    job: Job
    space: Workspace
    listener: Listener
    stages: dict[str, Done] = field(default_factory=dict)

    @property
    def judge(self) -> Judge:
        """What is asked about the forms of the model."""
        return Judge(self.job.source)

    def all(self) -> dict[str, Any]:
        """Every stage of the recipe; returns the report."""
        root, recipe = self.space.root, self.job.recipe
        dense = self._dense()
        masked, masked_folder = self._compress(dense)
        if recipe.finetune.epochs and not self.job.source.synthetic:
            masked, masked_folder = self._finetune(dense, masked)
        self._deploy(masked, masked_folder)
        self._export("dense")
        self._export("compressed")
        if recipe.engine is not None:
            for target in recipe.engine.targets:
                self._engine(target)
        if recipe.bench is not None:
            self._bench()
        facts = {name: {**done.facts, "seconds": done.seconds} for name, done in self.stages.items()}
        self.space.forget_all_but(self.stages)
        files = [root / name for done in self.stages.values() for name in done.outputs]
        report = assemble(recipe, tool(), facts, masked.plan.provenance, files, root, self.job.source)
        write_report(report, files, root)
        return report

    def _step(
        self,
        name: str,
        inputs: Any,
        work: Callable[[str], Found],
        settled: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    ) -> Done:
        """A step, reused or carried out; `work` receives its key, under which it may keep what it resumes from."""
        self.listener.stage(name)
        key = step_key(name, inputs)
        done = self.space.step(name, key, lambda: work(key), settled=settled)
        self.stages[name] = done
        self.listener.done(name, done)
        return done

    def _saved(self, name: str, model: AnyModel, folder: Path) -> dict[str, Any]:
        """Figures of a model that is now in a folder, and the rung of what is read back from there."""
        again = load_model(save_model(model, folder))
        rung = self.judge.modules(name, model.module, "reloaded", again.module)
        require([rung])
        return {**self.judge.figures(again, folder), "parity": [rung.to_dict()]}

    # The stages. Each loads what the one before wrote, so a run that resumes takes the same path as one that does not.

    def _dense(self) -> TimmModel:
        folder = self.space.root / "dense"

        def work(key: str) -> Found:
            model = self._baseline(key) if trains(self.job) else self.job.dense
            return [folder], self._saved("dense", model, folder)

        self._step("dense", dense_inputs(self.job), work)
        return _open(folder, TimmModel)

    def _baseline(self, key: str) -> TimmModel:
        """The trained dense model: from the user's cache, or trained and left there for other recipes."""
        cached = baseline_folder(self.job)
        with exclusive(cached):
            if self.space.resume:
                with contextlib.suppress(ArtifactError, StorageError):
                    model = _open(cached, TimmModel)
                    log.info("the baseline was trained before; taken from %s", cached)
                    return model
            model = trained(self.job, self.space.scratch("dense"), key, on_epoch(self.listener))
            save_model(model, cached)
            return model

    def _compress(self, dense: TimmModel) -> tuple[MaskedModel, Path]:
        job, root = self.job, self.space.root
        folder = root / "masked"
        timers = clocks(job, dense, self.listener.progress)
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
                progress=on_epoch(self.listener),
                report=self.listener.progress,
            )
            found = allocation.to_dict()
            write_json(root / "allocation.json", found)
            write_text(root / "plan.json", masked.plan.to_json())
            facts = {
                **self._saved("masked", masked, folder),
                "pruned_shares": pruned_shares(masked),
                "latency": found["latency"],
                "limits": dense.family.limits(dense.module),
            }
            return [root / "allocation.json", root / "plan.json", folder], facts

        self._step("compress", inputs, work)
        return _open(folder, MaskedModel), folder

    def _table(self, clock: Clock) -> LatencyTable:
        """What the widths of one target cost: from the run's folder or the user's cache, or measured."""
        path = self.space.root / f"latency.{clock.setting.target}.json"

        def work(_: str) -> Found:
            if not self.space.resume:
                clock.forget()
            write_text(path, clock.table().to_json())
            return [path], {}

        self._step(f"latency-{clock.setting.target}", clock.key, work)
        return LatencyTable.from_json(path.read_text(encoding="utf-8"))

    def _finetune(self, dense: TimmModel, masked: MaskedModel) -> tuple[MaskedModel, Path]:
        job, root = self.job, self.space.root
        folder, section = root / "finetuned", job.recipe.finetune
        weights = [sha256(root / name / file) for name in ("dense", "masked") for file in MODEL_FILES]
        inputs = [weights, section.model_dump(mode="json"), job.source.digest, job.recipe.compress.seed]

        def work(key: str) -> Found:
            scratch, seed = self.space.scratch("finetune"), job.recipe.compress.seed
            stage = Finetune(section, job.source, dense, seed, scratch, key, on_epoch(self.listener))
            made = run_stage(stage, masked)
            return [folder], {**self._saved("finetuned", made, folder), "found": made.provenance["finetuned"]}

        self._step("finetune", inputs, work)
        return _open(folder, MaskedModel), folder

    def _deploy(self, masked: MaskedModel, before: Path) -> None:
        folder = self.space.root / "deploy"

        def work(_: str) -> Found:
            sliced = run_stage(Slice(), masked)
            deploy = run_stage(Split(), sliced)
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
        self._step("deploy", inputs, work)

    def _export(self, which: str) -> None:
        root, recipe = self.space.root, self.job.recipe
        folder = root / ("dense" if which == "dense" else "deploy")
        path = root / "onnx" / f"{which}.fp32.onnx"
        inputs = [
            [sha256(folder / file) for file in MODEL_FILES],
            recipe.export.model_dump(mode="json"),
            self.job.source.digest,
            [version(name) for name in ("onnx", "onnxscript", "onnxsim", "onnxruntime")],
        ]

        def work(_: str) -> Found:
            model = _open(folder, TimmModel) if which == "dense" else _open(folder, DeployModel)
            stage = Export(recipe.export, path, self.judge.images(), not self.job.source.synthetic, tool())
            made = run_stage(stage, model)
            facts = {"parity": [made.rung.to_dict()], "graph": graph_dict(made.graph), "bytes": made.graph.size_bytes}
            return made.graph.files, {**facts, **self.judge.graph(path)}

        self._step(f"onnx-{which}", inputs, work)

    def _engine(self, target: str) -> None:
        root, section = self.space.root, self.job.recipe.engine
        assert section is not None
        path, folder = root / "onnx" / "compressed.fp32.onnx", root / "engines" / target

        def work(_: str) -> Found:
            stage = BuildEngine(section, target, folder)
            made = run_stage(stage, OnnxArtifact(path, "fp32", self.job.dense.preprocess))
            rung = self.judge.engine(path, made, section.batch)
            if rung.verdict != "not_run":
                require([rung])
            return [folder], {"target": target, "file": made.path.name, "parity": [rung.to_dict()]}

        self._step(f"engine-{target}", [sha256(path), section.model_dump(mode="json"), runtime(target)], work)

    def _bench(self) -> None:
        section = self.job.recipe.bench
        assert section is not None
        with Devices() as devices:
            for target, batch, threads in product(section.targets, section.batch, section.threads):
                self._cell(devices.get(target), batch, threads)

    def _cell(self, device: Device, batch: int, threads: int) -> None:
        root, target = self.space.root, device.name
        pair = (
            [root / "dense", root / "deploy"]
            if device.runtime == "eager"
            else [root / "onnx" / "dense.fp32.onnx", root / "onnx" / "compressed.fp32.onnx"]
        )
        parity = self._parity()

        def work(_: str) -> Found:
            found = bench_compare(
                pair[0],
                pair[1],
                target=device.runtime,
                batch=batch,
                threads=threads,
                affinity=device.affinity,
                transport=device.transport,
                parity=parity,
                on_progress=lambda text, share: self.listener.progress(share, text),
            )
            path = root / "bench" / f"{target}.fp32.b{batch}.t{threads}.json"
            found.save(path)
            return [path], cell_facts(target, found)

        digests = [sha256(file) for artifact in pair for file in files_below(artifact)]
        inputs = [digests, target, batch, threads, parity, conditions_of(target, threads)]
        self._step(f"bench-{target}.b{batch}.t{threads}", inputs, work, settled=conclusive)

    def _parity(self) -> Parity:
        """What the rungs up to the files that are timed prove; engines are built from these and are not timed here."""
        stages = [done.facts.get("parity", []) for name, done in self.stages.items() if not name.startswith("engine-")]
        rungs = [rung["verdict"] for found in stages for rung in found]
        return "pass" if rungs and set(rungs) == {"pass"} else "not claimed"


def _open(folder: Path, kind: type[M]) -> M:
    model = load_model(folder)
    if not isinstance(model, kind):
        raise ArtifactError(f"{folder} holds a {model.stage} model, expected a {kind.stage} one")
    return model
