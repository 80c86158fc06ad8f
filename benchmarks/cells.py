"""Measuring one cell: compress (or let a peer prune), recover, slice, evaluate. The library's own stages, in process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peers
import torch
from records import described, machine, pack, versions
from references import Ready
from suite import Cell, epochs
from torch import nn

from toolchain.compress.method import Allocation
from toolchain.compress.stage import pruned_shares
from toolchain.cost import ModelShape, Widths, trace
from toolchain.data import DataSource, batches
from toolchain.errors import ArtifactError
from toolchain.files import digest_of, exclusive, read_json, sha256, write_json
from toolchain.likelihood import CATEGORICAL
from toolchain.model import MaskedModel, run_stage
from toolchain.pipeline.job import Job, clocks, prepare
from toolchain.pipeline.job import compressed as compress
from toolchain.pipeline.latency_budget import latency_of
from toolchain.progress import Nobody, Progress
from toolchain.recipe import Recipe
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.evaluate import accuracy
from toolchain.training.stages import Finetune

Told = Callable[[str], None]


class Clock:
    """Seconds of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on `phase`."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def skip(self) -> None:
        """The time since the last lap was counted by another clock."""
        self._since = time.monotonic()


def measure(
    cell: Cell, recipe: Recipe, peer: Mapping[str, Any], reference: Ready, work: Path, key: str, told: Told
) -> dict[str, Any]:
    """What is recorded of a cell.

    Args:
        cell: which.
        recipe: its recipe, from the reference's weights.
        peer: settings of another tool; {} for slimvit's methods.
        reference: the dense model.
        work: where compressed models and training checkpoints are kept.
        key: digest of everything that the outcome depends on.
        told: receives how far it is.
    """
    clock, job = Clock(), prepare(recipe)
    clock.lap("prepare")
    masked, found = compressed(job, peer, reference, work, told)
    clock.seconds |= found["seconds"]
    clock.skip()
    kept: str | None = None
    if cell.training == "recovered":
        scratch = work / "scratch" / f"{key}.safetensors"
        after = recovered(job, masked, scratch, key, told)
        masked, kept = after, "before" if after.module is masked.module else "after"
        clock.lap("recovery")
        scratch.unlink(missing_ok=True)
    module, shape = final(job, masked, peer)
    clock.lap("slice")
    figures = evaluated(module, job.dense.module, job.source)
    clock.lap("evaluate")
    return {
        "definition": {"recipe": described(recipe), "peer": dict(peer)},
        "weights_sha256": reference.weights_sha256,
        "trained": reference.facts["trained"],
        "epochs": epochs(recipe),
        "labels": bool(peer)
        or recipe.compress.neurons in ("vtp", "taylor")
        or (cell.training == "recovered" and recipe.finetune.labels),
        "recovery_kept": kept,
        **cost(shape),
        "dense": cost(job.allocation.dense),
        **figures,
        **{name: value for name, value in found.items() if name != "seconds"},
        "seconds": {phase: round(value, 2) for phase, value in clock.seconds.items()},
        **machine(),
        "versions": {**versions(), **(peers.peer_version() if peer else {})},
    }


def compressed(
    job: Job, peer: Mapping[str, Any], reference: Ready, work: Path, told: Told
) -> tuple[MaskedModel, dict[str, Any]]:
    """(the model before recovery, facts with the seconds that it took): shared by all cells that begin alike."""
    raw = job.recipe.model_dump(mode="json")
    extra = peers.peer_version() if peer else {}
    decides = {name: raw[name] for name in ("model", "data", "compress", "budget")}
    decides["model"] = {**decides["model"], "checkpoint": ""}
    key = digest_of("compressed", decides, dict(peer), reference.weights_sha256, {**versions(), **extra})
    folder = work / "compressed" / key[:24]
    with exclusive(folder):
        facts = folder.with_suffix(".json")
        if not peer and facts.is_file() and folder.is_dir():
            model = load_model(folder)
            known = read_json(facts)
            if isinstance(model, MaskedModel) and known["weights_sha256"] == sha256(folder / "model.safetensors"):
                return model, known["facts"]
        clock = Clock()
        if peer:  # a peer's shapes have no plan to be rebuilt from; pruning again takes seconds
            made, found = peers.prune(job.dense, job.source, peers.Settings.of(peer))
            clock.lap("compress")
            return made, {"peer": found, "units": {}, "pruned_shares": [], "seconds": clock.seconds}
        made, allocation = _compress(job, reference, work / "scratch" / f"{key}.safetensors", key, told)
        clock.lap("compress")
        latency = allocation.to_dict()["latency"]
        found = {**_plan_facts(made), **({"latency": latency} if latency else {}), "seconds": clock.seconds}
        save_model(made, folder)
        write_json(facts, {"weights_sha256": sha256(folder / "model.safetensors"), "facts": found})
    (work / "scratch" / f"{key}.safetensors").unlink(missing_ok=True)
    return made, found


def _compress(job: Job, reference: Ready, scratch: Path, key: str, told: Told) -> tuple[MaskedModel, Allocation]:
    dense = replace(job.dense, provenance={**job.dense.provenance, "weights_sha256": reference.weights_sha256})
    latency = latency_of(clocks(job, dense, steps(told).at))
    return compress(job, dense, latency, checkpoint=scratch, key=key, progress=steps(told))


def _plan_facts(made: MaskedModel) -> dict[str, Any]:
    widths, units = Widths.of(made.plan), {}
    for group in made.groups:
        units[group.unit] = units.get(group.unit, 0) + group.total * group.partitions
    return {
        "widths": [{"module": module, "unit": unit, "kept": kept} for (module, unit), kept in widths.kept.items()],
        "ranks": [{"linear": linear, "rank": rank} for linear, rank in widths.ranks.items()],
        "units": units,
        "pruned_shares": pruned_shares(made),
        "closed_form": made.plan.provenance["closed_form"],
        "plan_sha256": made.plan.digest,
    }


def recovered(job: Job, masked: MaskedModel, scratch: Path, key: str, told: Told) -> MaskedModel:
    """The model after [finetune]; the same stage for every method, and for peers."""
    stage = Finetune(
        job.recipe.finetune,
        job.source,
        job.dense,
        job.recipe.compress.seed,
        checkpoint=scratch,
        key=key,
        progress=steps(told),
    )
    return run_stage(stage, masked).artifact


def final(job: Job, masked: MaskedModel, peer: Mapping[str, Any]) -> tuple[nn.Module, ModelShape]:
    """(the module that would be shipped, its shapes): sliced and split, unless a peer has cut it already."""
    module = masked.module.eval() if peer else run_stage(Split(), run_stage(Slice(), masked).artifact).artifact.module
    shape = trace(module, masked.family, masked.preprocess.input_size)
    left = sum(parameter.numel() for parameter in module.parameters())
    if shape.params != left:
        raise ArtifactError(f"the model has {left:,} parameters, its shapes give {shape.params:,}")
    if not peer and shape.params > job.allocation.dense.params:
        raise ArtifactError(f"the compressed model has {left:,} parameters, more than the dense one")
    return module, shape


def cost(shape: ModelShape) -> dict[str, int]:
    """Parameters, MACs and bytes that are physically there."""
    return {"params": shape.params, "macs": shape.macs, "bytes": shape.size_bytes}


def evaluated(module: nn.Module, dense: nn.Module, source: DataSource) -> dict[str, Any]:
    """{"validation", "test"}: which images are right; and on validation the mean KL divergence from the dense model."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch, _ in batches(source.split("validation"), 256):
            total += float(CATEGORICAL.divergence(module(batch).double(), dense(batch).double()).sum())
            count += len(batch)
    validation = pack(accuracy(module, source.split("validation")))
    return {"validation": {**validation, "kl": total / count}, "test": pack(accuracy(module, source.split("test")))}


def steps(told: Told) -> Progress:
    """Progress that says each new percent."""
    return Progress(_Percents(told))


class _Percents(Nobody):
    def __init__(self, told: Told) -> None:
        self._told, self._last = told, -1

    def at(self, share: float, text: str) -> None:
        """Says a share that is another percent than the last one was."""
        if int(100 * share) != self._last:
            self._last = int(100 * share)
            self._told(f"{share:4.0%} {text}")
