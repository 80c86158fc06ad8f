"""What compressing costs in time and memory, measured in a fresh process.

The weights are untrained with randomised biases and norms, and the images are smooth noise, so nothing here says
anything about accuracy. The solver and the closed form do the same work on them as on real images.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from records import Record, described, here, versions
from torch import Tensor
from torch.nn import functional

from kinds.base import Outcome
from kinds.compression import Compression, CompressionCell, cost
from toolchain.compress.closed_form import affordable_betas
from toolchain.compress.problem import Problem
from toolchain.compress.stage import Compress
from toolchain.cost import Widths, trace
from toolchain.data import DataSource, Images
from toolchain.data.transforms import Preprocessing
from toolchain.files import digest_of
from toolchain.model import Preprocess, TimmModel, run_stage
from toolchain.progress import Nobody, Progress
from toolchain.recipe import CompressSection, Recipe
from toolchain.surgery.load import load_dense, randomise_untrained
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

if TYPE_CHECKING:
    from engine import Bench

HERE = Path(__file__).resolve().parent
VALIDATION = 256  # as many as damage is measured on at most
COARSE = 14  # a noise image is drawn with that many pixels a side, and enlarged


class Cost(Compression):
    """slimvit's own methods, of which time and memory are measured, not accuracy."""

    name = "cost"
    measures = "scale"

    def measure(self, cell: CompressionCell, bench: Bench, progress: Progress) -> Outcome:
        """Raises RuntimeError with the last lines of the process if it fails."""
        recipe = self.recipe(cell, bench.suite)
        command = [sys.executable, "-m", "kinds.cost", json.dumps(recipe.model_dump(mode="json"))]
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"measuring ended with {done.returncode}:\n{done.stderr[-2000:]}")
        definition = {**cell.about, "recipe": described(recipe), "peer": {}}
        return Outcome(definition, **json.loads(done.stdout.splitlines()[-1]))

    def summary(self, record: Record) -> str:
        """Parameters and memory."""
        return f"{record.result['params']:,} params, {record.result['peak_bytes'] / 2**30:.2f} GiB at most"


def pass_seconds(record: Record) -> tuple[int, float]:
    """(how often a cell went through the model in closed form, once for each β; the seconds of once)."""
    recipe = record.definition["recipe"]
    section = CompressSection.model_validate(recipe["compress"])
    tried = len(affordable_betas(section, record.result["dense"]["macs"], recipe["data"]["calibration_images"]))
    return tried, record.seconds.get("closed form", 0.0) / tried


def smooth_noise(input_size: tuple[int, int, int], calibration: int, seed: int) -> DataSource:
    """An unlabelled source of seeded smooth noise; what is kept in memory is small, as for images on a disk.

    It does not call itself synthetic: a synthetic source turns the solver off, and that is what is measured.
    """
    channels, height, width = input_size
    drawn = torch.randn(
        calibration + VALIDATION, channels, COARSE, COARSE, generator=torch.Generator().manual_seed(seed)
    )

    def load(position: int) -> Tensor:
        return functional.interpolate(drawn[position][None], (height, width), mode="bicubic", align_corners=False)[0]

    images = Images(load, [-1] * len(drawn))
    fitting, held_out = images.take(torch.arange(calibration)), images.take(torch.arange(calibration, len(drawn)))
    splits = {"train": fitting, "calibration": fitting, "validation": held_out, "test": held_out}
    half = (0.5,) * channels
    return DataSource(
        name="smooth-noise",
        preprocessing=Preprocessing(input_size, half, half, "bicubic"),
        digest=digest_of("smooth noise", list(input_size), calibration, seed),
        splits=splits,
    )


def peak_bytes() -> int:
    """The most memory that this process has held.

    On Linux not by getrusage: its maximum may be that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(recipe: Recipe) -> dict[str, Any]:
    """The parts of a record: seconds of each phase, and peak memory before and after compressing."""
    seed = recipe.compress.seed
    start = load_dense(recipe.model, seed=seed)
    module, family = start.module, start.family
    randomise_untrained(module, seed)
    size = family.input_size(module)
    half = (0.5,) * size[0]
    groups = tuple(family.unit_groups(module))
    dense = TimmModel(start.ref, module, family, groups, Preprocess(size, half, half), start.provenance)
    source = smooth_noise(size, recipe.data.calibration_images, seed)
    loaded, before, seconds, since = peak_bytes(), trace(module, family, size), {}, [time.monotonic()]

    def spent(phase: str) -> None:
        now = time.monotonic()
        seconds[phase] = seconds.get(phase, 0.0) + now - since[0]
        since[0] = now

    class Clock(Nobody):
        def at(self, share: float, text: str) -> None:
            spent("damage" if text.startswith("damage") else "closed form")

    problem = Problem.of(dense, recipe.compress, recipe.budget, {})
    stage = Compress(source, progress=Progress(Clock()))
    masked = run_stage(stage, problem).artifact
    spent("rest")
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    spent("slice")
    after = trace(deploy.module, family, size)
    result = {
        "blocks": len(family.blocks(module)),
        **cost(after),
        "dense": cost(before),
        "widths": [
            {"module": m, "unit": unit, "kept": kept} for (m, unit), kept in Widths.of(masked.plan).kept.items()
        ],
        "peak_bytes": peak_bytes(),
        "peak_bytes_loaded": loaded,
    }
    return {"result": result, "seconds": seconds, "machine": here(), "versions": versions()}


KIND = Cost()

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(json.dumps(measured(Recipe.from_dict(json.loads(sys.argv[1])))))
