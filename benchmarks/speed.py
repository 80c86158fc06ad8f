"""Latency of DeiT shapes, dense and compressed, by the paired protocol: `python benchmarks/speed.py`.

Weights are untrained and images are noise: latency depends on shapes alone, and nothing here says anything about
accuracy. Goes on with the comparisons that are not recorded yet, and writes the table anew. On a quiet machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
from predict import matmul_rate
from speed_page import page

from toolchain.analysis.realised import Floor
from toolchain.artifacts.onnx_file import read_onnx
from toolchain.artifacts.size import artifact_size_bytes
from toolchain.compress.decide import Latency
from toolchain.cost import trace
from toolchain.errors import ArtifactError, StorageError, TargetUnavailable
from toolchain.export.convert import Convert
from toolchain.export.onnx_graph import (
    export_onnx,
)
from toolchain.files import write_text
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.experiment import require_target
from toolchain.measure.samples import BLOCKS, SESSIONS, WARMUP_S, Design, Workload
from toolchain.model import OnnxArtifact, run_stage
from toolchain.parity import BATCHES
from toolchain.pipeline.job import compressed, prepare, tool
from toolchain.recipe import Recipe
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

HERE = Path(__file__).resolve().parent
MODELS = {"tiny": "deit_tiny_patch16_224", "small": "deit_small_patch16_224", "base": "deit_base_patch16_224"}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "split50": {"compress": {"method": "joint", "attention": "data_aware"}, "budget": {"params": 0.5}},
    "joint50": {"compress": {"method": "joint"}, "budget": {"params": 0.5}},
    "joint30": {"compress": {"method": "joint"}, "budget": {"params": 0.3}},
}
PRECISIONS = ("fp32", "int8-dynamic")
MACS = {"tiny": 1.26e9, "small": 4.6e9, "base": 17.6e9}
"""Of one image of the dense model, rounded."""
LONG_MACS = 9e9
"""From here on a call of the dense model takes so long (about 0.2 s) that half of the blocks take longer than all do elsewhere."""
SMALLER = {"base": "small", "small": "tiny"}
GPU = (("ort-cuda", 1), ("ort-cuda+graph+spin", 1), ("ort-cuda", 64))
"""(target, batch): as a program calls the runtime, with as little of the host's time as there can be, and with a full device."""


@dataclass(frozen=True)
class Cell:
    """One comparison: `b` against `a`, each (form, precision) of one model."""

    model: str
    a: tuple[str, str]
    b: tuple[str, str]
    target: str
    batch: int
    threads: int

    @property
    def name(self) -> str:
        """Of its file."""
        pair = "--".join("-".join(each) for each in (self.a, self.b))
        return f"{self.model}.{pair}.{self.target}.b{self.batch}.t{self.threads}"

    @property
    def timm_name(self) -> str:
        """Of the model."""
        return MODELS[self.model]

    @property
    def is_form(self) -> bool:
        """Whether `b` is a form of the model itself, not another model in its place."""
        return self.b[0] in FORMS

    @property
    def macs(self) -> float:
        """Of one call of the dense model."""
        return MACS[self.model] * self.batch

    @property
    def blocks(self) -> int:
        """Of each session."""
        return BLOCKS // 2 if self.macs >= LONG_MACS and "cpu" in self.target else BLOCKS


def cells() -> list[Cell]:
    """Everything that is measured: each form against the dense fp32 model, and on ONNX Runtime the two forms of half size.

    So is the next smaller model off the shelf, in place of a form: what one could have taken instead.
    On a GPU half of the parameters beside the dense model, both in fp16, which is what ships there.
    """
    dense = ("dense", "fp32")
    against = [(dense, (form, precision)) for precision in PRECISIONS for form in FORMS if (form, precision) != dense]
    pairs = {"ort-cpu": [*against, (("split50", "fp32"), ("joint50", "fp32"))], "openvino-cpu": against}
    found = [
        Cell(model, a, b, target, batch, threads)
        for model in ("tiny", "small")
        for target, batch, threads in itertools.product(pairs, (1, 8), (1, 2))
        for a, b in pairs[target]
    ]
    found += [Cell("base", a, b, target, 1, 1) for target in pairs for a, b in pairs[target]]
    found += [Cell(model, dense, (smaller, "fp32"), "ort-cpu", 1, 1) for model, smaller in SMALLER.items()]
    found += [Cell("small", ("dense", "fp16"), ("joint50", "fp16"), target, batch, 1) for target, batch in GPU]
    return found


def missing(target: str) -> str:
    """Why the target cannot time anything here, or "" if it can."""
    try:
        require_target(target, ())
    except TargetUnavailable as error:
        return str(error)
    return ""


def artifact(model: str, form: str, precision: str, work: Path) -> Path:
    """The ONNX file of one model in one form, or of the smaller model that stands in its place, made once."""
    if form in MODELS:
        return artifact(form, "dense", precision, work)
    path = work / f"{model}.{form}.{precision}.onnx"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    if precision != "fp32":
        whole = artifact(model, form, "fp32", work)
        size = tuple(axis.dim_value for axis in read_onnx(whole).graph.input[0].type.tensor_type.shape.dim[1:])
        images = np.random.default_rng(0).standard_normal((max(BATCHES), *size), dtype=np.float32)
        run_stage(Convert(precision, path, images, images, real_images=False), OnnxArtifact(whole, "fp32"))
        return path
    raw = {"model": {"name": MODELS[model], "pretrained": False}, "data": {"source": "none", "calibration_images": 32}}
    job = prepare(Recipe.from_dict({**raw, **(FORMS[form] or {"compress": {"method": "none"}})}))
    module = job.dense.module
    if form != "dense":
        masked, _ = compressed(job, job.dense, Latency())
        module = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact.module
    shape = trace(module, job.dense.family, job.dense.preprocess.input_size)
    metadata = {"slimvit.tool": tool(), "benchmark": path.stem, "params": str(shape.params), "macs": str(shape.macs)}
    size = job.dense.preprocess.input_size
    export_onnx(module, path, input_size=size, opset=20, metadata=metadata, simplify=True)
    return path


def result_of(cell: Cell, results: Path) -> Comparison | None:
    """The recorded comparison of a cell, all its statistics recomputed; None if there is none that holds."""
    try:
        return Comparison.load(results / f"{cell.name}.json")
    except (ArtifactError, StorageError):
        return None


def current(cell: Cell, found: Comparison | Floor, work: Path) -> bool:
    """Whether a record is of the files as they are made now.

    Their bytes are counted and not compared: compressed weights differ in their last bits from processor to processor, and
    latency does not depend on them.
    """
    sizes = [artifact_size_bytes(artifact(cell.model, *each, work)) for each in (cell.a, cell.b)]
    return sizes == [found.artifacts[name].size_bytes for name in ("A", "B")]


def predicted_seconds(cell: Cell, rate: float) -> float:
    """Of a comparison that has one look, from the MACs of the dense model at `rate` MACs a second and thread."""
    dense_s = cell.macs / (rate * cell.threads)
    slot_s = max(0.05, (3 if dense_s < 0.1 else 2) * dense_s)
    return SESSIONS * (2 + 3 * max(WARMUP_S, 10 * dense_s) * 0.75 + cell.blocks * 2.2 * slot_s)


def table(results: Path, wanted: Iterable[Cell]) -> str:
    """The page of what is recorded, every number computed from its raw samples."""
    return page([(cell, result_of(cell, results)) for cell in wanted])


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything that was asked for, and that this machine can time, is recorded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name contains it")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and how long it would take")
    parser.add_argument("--report", action="store_true", help="only write the table anew")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "speed")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "speed", help="where the models are kept")
    options = parser.parse_args(arguments)
    chosen = [cell for cell in cells() if options.only in cell.name]
    if not chosen:
        print(f"error: no cell has {options.only!r} in its name", file=sys.stderr)
        return 2
    if not options.report:
        for target in sorted({cell.target for cell in chosen}):
            if why := missing(target):
                left = [cell for cell in chosen if cell.target == target]
                print(f"speed: {len(left)} comparisons are left out: {why}")
                chosen = [cell for cell in chosen if cell not in left]
        recorded = {cell: result_of(cell, options.results) for cell in chosen}
        todo = [cell for cell in chosen if recorded[cell] is None]
        rate = matmul_rate()
        seconds = sum(predicted_seconds(cell, rate) for cell in todo)
        print(
            f"speed: {len(todo)} of {len(chosen)} comparisons to do, predicted {seconds / 3600:.2f} hours ({rate / 1e9:.0f} GMAC/s)"
        )
        if options.dry_run:
            return 0
        for cell in chosen:
            found = recorded[cell]
            if found is not None and current(cell, found, options.work):
                continue
            pair = [artifact(cell.model, *each, options.work) for each in (cell.a, cell.b)]
            workload, design = Workload(cell.batch, cell.threads), Design(blocks=cell.blocks, looks=2)
            found = compare(*pair, cell.target, workload, design)
            found.save(options.results / f"{cell.name}.json")
            print(f"{cell.name}: {found.verdict}, {1 / found.ratio.to_ratio()['point']:.2f}×", flush=True)
    write_text(options.results / "README.md", table(options.results, cells()))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
