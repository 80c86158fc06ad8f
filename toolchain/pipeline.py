"""A recipe's stages in order, each checked, recorded, and taken up again where a killed run stopped."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
from torch import Tensor, nn

from toolchain.artifact import (
    AnyModel,
    DeployModel,
    MaskedModel,
    OnnxArtifact,
    TimmModel,
    atomic_folder,
    digest_of,
    run_stage,
    sha256,
    write_json,
    write_text,
)
from toolchain.bench.compare import compare as bench_compare
from toolchain.bench.summary import summary
from toolchain.cache import Done, Workspace, exclusive, files_below, user_cache
from toolchain.compress.stage import Compress, pruned_shares
from toolchain.cost import trace
from toolchain.errors import ArtifactError, MeasurementError, StorageError
from toolchain.export.engine import BuildEngine
from toolchain.export.parity import TOLERANCES, Rung, compare, not_run, require
from toolchain.export.stage import Export, graph_dict, stack_images, torch_call
from toolchain.job import Job, dense_key, prepare, tool, trained, trains
from toolchain.recipe import Recipe
from toolchain.report.assemble import assemble, listing
from toolchain.report.markdown import to_markdown
from toolchain.report.page import to_html
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.targets import get_target
from toolchain.training.evaluate import accuracy
from toolchain.training.loop import Progress
from toolchain.training.stages import Finetune

log = logging.getLogger(__name__)
PARITY_IMAGES = 8
MODEL_FILES = ("model.safetensors", "model.json")


class Listener(Protocol):
    """Who is told how far a run is."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def progress(self, share: float, text: str) -> None:
        """`share` of the stage is done."""
        ...

    def done(self, name: str, done: Done) -> None:
        """A stage ended."""
        ...


class Silent:
    """A listener that does nothing."""

    def stage(self, name: str) -> None: ...

    def progress(self, share: float, text: str) -> None: ...

    def done(self, name: str, done: Done) -> None: ...


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
        SlimvitError: see `toolchain.errors`; what was finished before stays and is reused by the next run.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(Path(recipe))
    workspace = Workspace(Path(out).resolve(), resume=resume)
    workspace.check()
    job = prepare(recipe)
    with workspace.open() as space:
        return _Run(job, space, listener or Silent()).all()


def on_epoch(listener: Listener) -> Callable[[Progress], None]:
    """A training callback that tells a listener."""

    def told(progress: Progress) -> None:
        share = ((progress.epoch - 1) + progress.step / progress.steps) / progress.epochs
        listener.progress(share, f"epoch {progress.epoch}/{progress.epochs}, loss {progress.loss:.3f}")

    return told


@dataclass
class _Run:
    job: Job
    space: Workspace
    listener: Listener
    stages: dict[str, Done] = field(default_factory=dict)

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
        write_json(root / "report.json", report)
        write_text(root / "report.md", to_markdown(report))
        write_text(root / "report.html", to_html(report))
        self._manifest([*files, *(root / f"report.{suffix}" for suffix in ("json", "md", "html"))])
        return report

    def _step(self, name: str, inputs: Any, work: Callable[[], tuple[Iterable[Path], dict[str, Any]]]) -> Done:
        self.listener.stage(name)
        versions = [tool(), torch.__version__, timm.__version__]
        done = self.space.step(name, digest_of(name, versions, inputs), work)
        self.stages[name] = done
        self.listener.done(name, done)
        return done

    # The stages. Each loads what the one before wrote, so a run that resumes takes the same path as one that does not.

    def _dense(self) -> TimmModel:
        job, folder = self.job, self.space.root / "dense"
        key = dense_key(job)

        def work() -> tuple[list[Path], dict[str, Any]]:
            if not trains(job):
                return [save_model(job.dense, folder)], self._judge(job.dense, folder)
            cached = user_cache() / "dense" / key
            with exclusive(cached):
                if _usable(cached):
                    log.info("the baseline was trained before; taken from %s", cached)
                else:
                    save_model(trained(job, self.space.scratch("dense"), on_epoch(self.listener)), cached)
                with atomic_folder(folder) as partial:
                    shutil.copytree(cached, partial, dirs_exist_ok=True)
            return [folder], self._judge(load_model(folder), folder)

        self._step("dense", key, work)
        dense = load_model(folder)
        assert isinstance(dense, TimmModel)
        return dense

    def _compress(self, dense: TimmModel) -> tuple[MaskedModel, Path]:
        job, root = self.job, self.space.root
        folder = root / "masked"
        inputs = [
            sha256(root / "dense" / "model.safetensors"),
            sha256(root / "dense" / "model.json"),
            job.recipe.compress.model_dump(mode="json"),
            job.recipe.budget.model_dump(mode="json"),
            dict(job.multiples),
            job.source.digest,
        ]

        def work() -> tuple[list[Path], dict[str, Any]]:
            scratch, key = self.space.scratch("compress"), digest_of(inputs)
            stage = Compress(
                job.recipe.compress,
                job.recipe.budget,
                job.source,
                job.multiples,
                scratch,
                key,
                on_epoch(self.listener),
                self.listener.progress,
            )
            with_digest = {**dense.provenance, "weights_sha256": inputs[0]}
            masked = run_stage(stage, replace(dense, provenance=with_digest))
            write_json(root / "allocation.json", job.allocation.to_dict())
            write_text(root / "plan.json", masked.plan.to_json())
            save_model(masked, folder)
            facts = {**self._judge(masked, folder), "pruned_shares": pruned_shares(masked)}
            return [root / "allocation.json", root / "plan.json", folder], facts

        self._step("compress", inputs, work)
        return _masked(folder), folder

    def _finetune(self, dense: TimmModel, masked: MaskedModel) -> tuple[MaskedModel, Path]:
        job, root = self.job, self.space.root
        folder, section = root / "finetuned", job.recipe.finetune
        weights = [sha256(root / name / file) for name in ("dense", "masked") for file in MODEL_FILES]
        inputs = [weights, section.model_dump(mode="json"), job.source.digest, job.recipe.compress.seed]

        def work() -> tuple[list[Path], dict[str, Any]]:
            scratch, key = self.space.scratch("finetune"), digest_of(inputs)
            stage = Finetune(
                section, job.source, dense, job.recipe.compress.seed, scratch, key, on_epoch(self.listener)
            )
            tuned = run_stage(stage, masked)
            save_model(tuned, folder)
            return [folder], self._judge(tuned, folder)

        self._step("finetune", inputs, work)
        return _masked(folder), folder

    def _deploy(self, masked: MaskedModel, before: Path) -> None:
        folder = self.space.root / "deploy"

        def work() -> tuple[list[Path], dict[str, Any]]:
            sliced = run_stage(Slice(), masked)
            deploy = run_stage(Split(), sliced)
            save_model(deploy, folder)
            again = load_model(folder)
            rungs = [
                self._rung("masked", masked.module, "sliced", sliced.module),
                self._rung("sliced", sliced.module, "split", deploy.module),
                self._rung("split", deploy.module, "deploy", again.module),
            ]
            require(rungs)
            facts = {"sliced": self._judge(sliced, None), **self._judge(deploy, folder)}
            return [folder], {**facts, "parity": [rung.to_dict() for rung in rungs]}

        inputs = [[sha256(before / file) for file in MODEL_FILES], self.job.source.digest]
        self._step("deploy", inputs, work)

    def _rung(self, from_: str, expected: nn.Module, to: str, got: nn.Module) -> Rung:
        return compare(
            from_,
            to,
            torch_call(expected),
            torch_call(got),
            stack_images(self._images()),
            tolerance=TOLERANCES["fp32"],
            real_images=not self.job.source.synthetic,
        )

    def _images(self) -> list[Tensor]:
        images = self.job.source.split("validation")
        return [images[index % len(images)][0] for index in range(PARITY_IMAGES)]

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

        def work() -> tuple[Iterable[Path], dict[str, Any]]:
            model = load_model(folder)
            if not isinstance(model, (TimmModel, DeployModel)):
                raise ArtifactError(f"{folder} holds a {model.stage} model; only dense and deploy models are exported")
            images = stack_images(self._images())
            stage = Export(recipe.export, path, images, not self.job.source.synthetic, tool())
            made = run_stage(stage, model)
            facts = {"parity": [made.rung.to_dict()], "graph": graph_dict(made.graph), "bytes": made.graph.size_bytes}
            with get_target("ort-cpu").open(path, threads=torch.get_num_threads()) as runner:
                facts |= self._accuracy(lambda x: torch.from_numpy(runner.infer({"image": x.numpy()})["logits"]))
            return made.graph.files, facts

        self._step(f"onnx-{which}", inputs, work)

    def _engine(self, target: str) -> None:
        root, section = self.space.root, self.job.recipe.engine
        assert section is not None
        path, folder = root / "onnx" / "compressed.fp32.onnx", root / "engines" / target

        def work() -> tuple[list[Path], dict[str, Any]]:
            stage = BuildEngine(section, target, folder)
            made = run_stage(stage, OnnxArtifact(path, "fp32", self.job.dense.preprocess))
            rung = not_run(path.name, made.path.name, tolerance=TOLERANCES["fp32"], reason=made.facts["loaded_reason"])
            if made.facts["loaded"] == "pass":
                rung = replace(rung, verdict="pass", reason="")
            return [folder], {"target": target, "file": made.path.name, "parity": [rung.to_dict()]}

        inputs = [sha256(path), section.model_dump(mode="json"), get_target(target).probe().version]
        self._step(f"engine-{target}", inputs, work)

    def _bench(self) -> None:
        section = self.job.recipe.bench
        assert section is not None
        for target in section.targets:
            for batch in section.batch:
                for threads in section.threads:
                    self._cell(target, batch, threads)

    def _cell(self, target: str, batch: int, threads: int) -> None:
        root = self.space.root
        pair = (
            [root / "dense", root / "deploy"]
            if target == "eager"
            else [root / "onnx" / "dense.fp32.onnx", root / "onnx" / "compressed.fp32.onnx"]
        )
        path = root / "bench" / f"{target}.fp32.b{batch}.t{threads}.json"

        def work() -> tuple[list[Path], dict[str, Any]]:
            def told(text: str, share: float) -> None:
                self.listener.progress(share, text)

            found = bench_compare(
                pair[0], pair[1], target=target, batch=batch, threads=threads, parity="pass", on_progress=told
            )
            found.save(path)
            record = {key: value for key, value in found.to_dict().items() if key not in ("raw", "parity")}
            times = {"dense_ms": found.latency_ms("A"), "compressed_ms": found.latency_ms("B")}
            return [path], {
                "target": target,
                "batch": batch,
                "threads": threads,
                **times,
                **record,
                "summary": summary(found),
            }

        inputs = [sha256(file) for folder in pair for file in files_below(folder)]
        self._step(f"bench-{target}.b{batch}.t{threads}", [inputs, target, batch, threads], work)

    # What is known of a model.

    def _judge(self, model: AnyModel, folder: Path | None) -> dict[str, Any]:
        """Parameters, MACs, bytes on disk and accuracy on the test split."""
        shape = trace(model.module, model.family, model.preprocess.input_size)
        size = shape.size_bytes if folder is None else (folder / "model.safetensors").stat().st_size
        return {"params": shape.params, "macs": shape.macs, "bytes": size, **self._accuracy(model.module)}

    def _accuracy(self, model: nn.Module | Callable[[Tensor], Tensor]) -> dict[str, Any]:
        if not self.job.source.labelled:
            return {"accuracy": None, "wrong": None, "total": None}
        found = accuracy(model, self.job.source.split("test"))
        return {"accuracy": found.accuracy, "wrong": found.wrong, "total": found.total}

    def _manifest(self, files: Sequence[Path]) -> None:
        names = ("slimvit", "torch", "timm", "onnx", "onnxruntime", "onnxsim", "numpy", "safetensors")
        record = {
            "schema": "slimvit.manifest/1",
            "recipe_digest": self.job.recipe.digest,
            "versions": {name: version(name) for name in names},
            "files": listing(files, self.space.root),
        }
        write_json(self.space.root / "manifest.json", record)


def _usable(folder: Path) -> bool:
    try:
        load_model(folder)
    except (ArtifactError, StorageError):
        return False
    return True


def _masked(folder: Path) -> MaskedModel:
    model = load_model(folder)
    if not isinstance(model, MaskedModel):
        raise ArtifactError(f"{folder} holds a {model.stage} model, expected a masked one")
    return model


def require_speedup(report: Mapping[str, Any], wanted: float) -> None:
    """Raises MeasurementError unless every measured cell verified at least this speedup."""
    if not report["bench"]:
        raise MeasurementError(f"a speedup of {wanted:g} was required, but the recipe measures nothing; add [bench]")
    for row in report["bench"]:
        found = row["verified_speedup_at_least"]
        if found is None or found < wanted:
            said = "no speedup was verified" if found is None else f"{found:.2f} was verified"
            raise MeasurementError(
                f"a speedup of {wanted:g} was required on {row['target']} (batch {row['batch']}, "
                f"{row['threads']} threads); {said} ({row['verdict']})"
            )
