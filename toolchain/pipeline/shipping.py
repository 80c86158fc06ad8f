"""From the deploy model to what ships: ONNX files in every precision, engines, and how fast they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from toolchain.artifacts.size import artifact_sha256, download_bytes
from toolchain.devices.device import Device, Devices
from toolchain.errors import ArtifactError, DeviceLost, ParityError, TargetUnavailable
from toolchain.export.engine import BuildEngine, builds
from toolchain.export.onnx_graph import data_beside
from toolchain.export.precision import EITHER, EITHER_OF, FP32, PRECISIONS, expanded, runs_on
from toolchain.export.stage import Export, graph_dict
from toolchain.files import sha256
from toolchain.gate.why import artifact_parts
from toolchain.measure.compare import compare as bench_compare
from toolchain.measure.experiment import workload_on
from toolchain.measure.samples import Parity
from toolchain.model import DeployModel, OnnxArtifact, TimmModel, run_stage
from toolchain.pipeline.cell import cell_facts, conclusive, conditions_of, runtime
from toolchain.pipeline.folder import Workspace
from toolchain.pipeline.job import tool
from toolchain.pipeline.steps import MODEL_FILES, Found, Steps, open_as
from toolchain.recipe import Recipe

log = logging.getLogger(__name__)
SHOWN = ("compute_capabilities", "matmul_dtypes", "attention_layers", "fused_attention")
"""Of engine.json, what the report shows."""
GRAPH_TOOLS = ("onnx", "onnxscript", "onnxsim", "onnxruntime", "ml_dtypes")


def ship(steps: Steps) -> None:
    """Everything that is made from `dense/` and `deploy/`; the facts are in the steps afterwards."""
    recipe = steps.job.recipe
    export(steps, "dense")
    export(steps, "compressed")
    wanted = expanded(recipe.export.precisions)
    made = [FP32, *(name for name in wanted if name != FP32 and convert(steps, name, wanted[name]))]
    either = [name for name in EITHER_OF if name in wanted]
    if either and not set(either) & set(made):
        raise ParityError(f"no int8 file is the model: {steps.stages[f'onnx-{either[0]}'].facts['refused']}")
    if recipe.engine is not None:
        for target, precision in product(recipe.engine.targets, made):
            if precision in wanted and builds(target, precision):
                engine(steps, target, precision)
    if recipe.bench is not None:
        with Devices() as devices:
            for target, batch, threads in product(recipe.bench.targets, recipe.bench.batch, recipe.bench.threads):
                where = Where(devices.get(target), batch, threads)
                for precision in made:
                    # int8 is held against fp32 as well, whether or not that is asked for
                    if (precision in wanted or either) and runs(where.device, precision):
                        cell(steps, where, precision)
                if set(EITHER_OF) <= set(made) and all(runs(where.device, name) for name in EITHER_OF):
                    duel(steps, where)


def export(steps: Steps, which: str) -> None:
    """`onnx/<which>.fp32.onnx`, read back and compared with the model that it came from."""
    root, recipe, source = steps.root, steps.job.recipe, steps.job.source
    folder = root / ("dense" if which == "dense" else "deploy")
    path = onnx_path(root, FP32, which)
    inputs = [
        [sha256(folder / file) for file in MODEL_FILES],
        recipe.export.model_dump(mode="json", include={"opset", "simplify", "preprocess", "softmax"}),
        source.digest,
        [version(name) for name in GRAPH_TOOLS],
    ]

    def work(_: str) -> Found:
        model = open_as(folder, TimmModel) if which == "dense" else open_as(folder, DeployModel)
        stage = Export(recipe.export, path, steps.judge.images(), steps.judge.names_classes, tool())
        made = run_stage(stage, model)
        facts = {
            "parity": [rung.to_dict() for rung in made.rungs],
            "graph": graph_dict(made.facts),
            "bytes": made.facts.size_bytes,
        }
        return made.facts.files, {**facts, **sizes(path), **steps.judge.graph(path)}

    steps.step(f"onnx-{which}", inputs, work)


def convert(steps: Steps, name: str, required: bool) -> bool:
    """`onnx/compressed.<precision>.onnx`, held against the fp32 file; whether it is the same model.

    Raises:
        ParityError: it is not, and it was asked for by its own name.
    """
    root, source = steps.root, steps.job.source
    before, path = onnx_path(root, FP32), onnx_path(root, name)
    judging = runtime(runs_on(PRECISIONS[name]))
    inputs = [artifact_sha256(before), name, source.digest, [version(t) for t in GRAPH_TOOLS], required, judging]

    def work(_: str) -> Found:
        judge, stage = steps.judge, steps.judge.convert(name, path)
        given = OnnxArtifact(before, FP32, steps.job.dense.preprocess)
        try:
            made = run_stage(stage, given)
        except (ParityError, ArtifactError) as error:
            if required:
                raise
            for file in (path, data_beside(path)):  # of an earlier run
                file.unlink(missing_ok=True)
            return [], {"precision": name, "refused": str(error)}
        facts = {
            "precision": name,
            "refused": None,
            "judged_on": made.facts.target,
            "parity": [rung.to_dict() for rung in made.rungs],
            "graph": graph_dict(made.facts.graph),
            "bytes": made.facts.graph.size_bytes,
        }
        return made.facts.graph.files, {**facts, **sizes(path), **judge.graph(path, made.facts.target)}

    return steps.step(f"onnx-{name}", inputs, work).facts["refused"] is None


def sizes(path: Path) -> dict[str, Any]:
    """What a file weighs when it is sent, and where its bytes are, by layer."""
    layers: Counter[str] = Counter()
    for (layer, _), count in artifact_parts(path).items():
        layers[layer] += count
    return {"download_bytes": download_bytes(path), "layers": dict(layers)}


def engine(steps: Steps, target: str, precision: str) -> None:
    """`engines/<target>.<precision>/`: the engine of a file, compared with it where it can be loaded.

    That of the fp32 file is in `engines/<target>/`.
    """
    root, section = steps.root, steps.job.recipe.engine
    assert section is not None
    suffix = "" if precision == FP32 else f".{precision}"
    path, folder = onnx_path(root, precision), root / "engines" / f"{target}{suffix}"

    def work(_: str) -> Found:
        stage = BuildEngine(section, target, folder, lambda built: steps.judge.engine(path, built, section.batch))
        made = run_stage(stage, OnnxArtifact(path, precision, steps.job.dense.preprocess)).artifact
        files = [file for file in sorted(folder.iterdir()) if file.suffix != ".json"]
        facts = {
            "target": target,
            "precision": precision,
            "file": made.path.name,
            "path": str(made.path.relative_to(root)),
            "parity": [made.facts["parity"]],
            "bytes": sum(file.stat().st_size for file in files),
            "download_bytes": sum(download_bytes(file) for file in files),
        }
        return [folder], facts | {name: made.facts.get(name) for name in SHOWN}

    steps.step(
        f"engine-{target}{suffix}", [artifact_sha256(path), section.model_dump(mode="json"), runtime(target)], work
    )


def runs(device: Device, precision: str) -> bool:
    """Whether a precision is timed on a device: fp32 everywhere, others where their files can be loaded."""
    return precision == FP32 or device.runtime.partition("+")[0] in PRECISIONS[precision].targets


@dataclass(frozen=True)
class Where:
    """What a latency is measured on."""

    device: Device
    batch: int
    threads: int

    @property
    def name(self) -> str:
        """Of steps and files: `<target>.b<batch>.t<threads>`."""
        return f"{self.device.name}.b{self.batch}.t{self.threads}"


def cell(steps: Steps, where: Where, precision: str) -> None:
    """`bench/<target>.<precision>.b<batch>.t<threads>.json`: the compressed file against the dense fp32 one."""
    root, device = steps.root, where.device
    pair = (
        (root / "dense", root / "deploy")
        if device.runtime == "eager"
        else (onnx_path(root, FP32, "dense"), onnx_path(root, precision))
    )
    suffix = "" if precision == FP32 else f".{precision}"
    _timed(steps, where, pair, f"bench-{where.name}{suffix}", precision, _parity(steps, precision))


def duel(steps: Steps, where: Where) -> None:
    """`bench/<target>.int8.b<batch>.t<threads>.json`: int8-qdq against int8-dynamic, to know the faster of the two."""
    first, second = EITHER_OF
    pair = (onnx_path(steps.root, first), onnx_path(steps.root, second))
    parity: Parity = "pass" if {_parity(steps, name) for name in EITHER_OF} == {"pass"} else "not claimed"
    _timed(steps, where, pair, f"duel-{where.name}", EITHER, parity)


def _timed(steps: Steps, where: Where, pair: tuple[Path, Path], step: str, what: str, parity: Parity) -> None:
    device, batch, threads = where.device, where.batch, where.threads

    def work(_: str) -> Found:
        if device.name in steps.lost:  # what was recorded before is reused; nothing more is asked of it
            raise steps.lost[device.name]
        found = bench_compare(
            *pair,
            device,
            workload_on(device, batch=batch, threads=threads),
            steps.design,
            parity=parity,
            progress=steps.progress,
        )
        path = steps.root / "bench" / f"{device.name}.{what}.b{batch}.t{threads}.json"
        found.save(path)
        return [path], {"precision": what, **cell_facts(device.name, found)}

    digests = [artifact_sha256(artifact) for artifact in pair]
    inputs = [digests, device.name, batch, threads, parity, conditions_of(device.name, threads)]
    try:
        steps.step(step, inputs, work, settled=conclusive)
    except TargetUnavailable as error:
        if device.is_here and not isinstance(error, DeviceLost):
            raise
        if device.name not in steps.lost:
            log.warning("%s The run goes on without it.", error)
        steps.lost[device.name] = error
        steps.keep(step, inputs)


def measured_on(space: Workspace, recipe: Recipe) -> list[str]:
    """Those targets of a recipe's [bench] on which an earlier run in the folder measured something."""
    return [name for name in (recipe.bench.targets if recipe.bench else ()) if space.has(f"bench-{name}.b")]


def onnx_path(root: Path, precision: str, which: str = "compressed") -> Path:
    """Where the ONNX file of one precision lies in a run's folder."""
    return root / "onnx" / f"{which}.{precision}.onnx"


def _parity(steps: Steps, precision: str) -> Parity:
    """What the rungs up to the file that is timed prove; engines and files of other precisions are not on its way."""
    others = {f"onnx-{name}" for name in PRECISIONS if name != precision}
    way = [done for name, done in steps.stages.items() if name not in others and not name.startswith("engine-")]
    rungs: Iterable[dict[str, Any]] = [rung for done in way for rung in done.facts.get("parity", [])]
    verdicts = {rung["verdict"] for rung in rungs}
    return "pass" if verdicts == {"pass"} else "not claimed"
