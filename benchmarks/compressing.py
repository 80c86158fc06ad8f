"""Compresses a backbone in a process of its own, which tells its seconds and its memory; what was made is kept for other cells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from kinds import torch_pruning
from kinds.compression import Clock
from kinds.cost import peak_bytes
from records import versions
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from toolchain.files import digest_of, exclusive, read_json, sha256, write_json
from toolchain.model import MaskedModel, TimmModel
from toolchain.pipeline.job import Job, prepare
from toolchain.pipeline.stages.compress import compress
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.surgery.replay import load_model, save_model

HERE = Path(__file__).resolve().parent
TOOLCHAIN = HERE.parent / "toolchain"
SEEN, HELD_OUT = 384, 38
"""Images that a method may see in all, and how many of them are kept apart for its own choices where the data set is large."""
NOTHING: dict[str, Any] = {"seconds": {}, "chosen": {}, "peak_bytes": None, "peak_bytes_loaded": None}
"""What is known of compressing where nothing was."""


def compressed(recipe: Recipe, job: Job, settings: Mapping[str, Any], work: Path) -> tuple[MaskedModel, dict[str, Any]]:
    """(the model before recovery, what the process that made it says of itself): shared by cells that begin alike."""
    alike = recipe.model_copy(update={"finetune": type(recipe.finetune)()})
    raw, code, weights = alike.model_dump(mode="json"), code_digest(), sha256(Path(recipe.model.checkpoint))
    folder = (
        work / "compressed" / digest_of("backbone", raw, job.source.digest, settings, versions(), code, weights)[:24]
    )
    with exclusive(folder):
        facts = folder.with_suffix(".json")
        if not facts.exists():
            asked = {"recipe": raw, "settings": dict(settings), "folder": str(folder), "work": str(work)}
            write_json(facts, process(asked))
    known: dict[str, Any] = read_json(facts)
    if known["masked"]:
        model = load_model(folder)
        assert isinstance(model, MaskedModel)
        return model, known
    how, ratios = torch_pruning.Settings.of(settings), known["chosen"]
    gradients, _ = gradients_of(job, how, work)
    ratio, neurons = ratios["pruning_ratio"], ratios["mlp_pruning_ratio"]
    pruned = torch_pruning.pruned(job.dense, gradients, how, ratio, neurons)
    return unplanned(job.dense, pruned, "torch-pruning"), known


def narrowed(job: Job) -> Job:
    """The job with no more images than a method may see in all: where validation is large, HELD_OUT of them.

    What is trained on is what is calibrated on.
    """
    source = job.source
    validation, calibration = source.split("validation"), source.split("calibration")
    if len(validation) + len(calibration) > SEEN:
        validation = validation.spread(min(HELD_OUT, len(validation)))
        calibration = calibration.spread(SEEN - len(validation))
    splits = {**source.splits, "calibration": calibration, "validation": validation, "train": calibration}
    return replace(job, source=replace(source, splits=splits))


def unplanned(dense: TimmModel, module: nn.Module, method: str) -> MaskedModel:
    """A module as a model without a plan, which recovery and judging take as any other."""
    plan = CompressionPlan(model=dense.ref, keeps=(), low_ranks=(), provenance={"method": method})
    return MaskedModel(
        dense.ref, module.eval(), dense.family, dense.groups, dense.preprocess, dense.provenance, plan=plan
    )


def code_digest() -> str:
    """Of slimvit's own code: what was compressed by another version of it is not taken from the work folder."""
    return digest_of([sha256(path) for path in sorted(TOOLCHAIN.rglob("*.py"))])


def process(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process says of itself that compresses; raises RuntimeError with its last lines if it fails."""
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": path}
    command = [sys.executable, "-m", "compressing", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"compressing ended with {done.returncode}:\n{done.stderr[-2000:]}")
    known: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return known


def apart(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the process does: compresses into a folder, or finds the ratios to prune by; its seconds, and its memory."""
    recipe, folder = Recipe.from_dict(asked["recipe"]), Path(asked["folder"])
    job, clock = narrowed(prepare(recipe)), Clock()
    loaded = peak_bytes()
    if asked["settings"]:
        settings = torch_pruning.Settings.of(asked["settings"])
        gradients, clock.seconds["gradients"] = gradients_of(job, settings, Path(asked["work"]))
        clock.skip()
        _, chosen = torch_pruning.prune(job.dense, job.source, settings, gradients)
    else:
        weights = sha256(Path(recipe.model.checkpoint))
        dense = replace(job.dense, provenance={**job.dense.provenance, "weights_sha256": weights})
        masked = compress(job, dense).artifact
        save_model(masked, folder)
        chosen = dict(masked.plan.provenance.get("closed_form", {}))
    clock.lap("compress")
    memory = {"peak_bytes": peak_bytes(), "peak_bytes_loaded": loaded}
    return {"masked": not asked["settings"], "seconds": clock.seconds, "chosen": chosen, **memory}


def gradients_of(job: Job, settings: torch_pruning.Settings, work: Path) -> tuple[dict[str, Tensor], float]:
    """(those that pruning ranks by, the seconds that they took): computed once for all settings that need the same."""
    weights = sha256(Path(job.recipe.model.checkpoint))
    alike = digest_of(settings.loss, settings.taylor_batches, settings.batch, job.source.digest, weights)
    path = work / "compressed" / f"gradients.{alike[:24]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            clock = Clock()
            gradients = torch_pruning.gradients_of(job.dense, job.source, settings)
            clock.lap("gradients")
            save_file(gradients, path, {"seconds": str(clock.seconds["gradients"])})
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, float(file.metadata()["seconds"])  # noqa: SIM118


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(json.dumps(apart(json.loads(sys.argv[1]))))
