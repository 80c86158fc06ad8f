"""A compression run: compress a dense model, recover, slice, evaluate; by the library's own stages, in process."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import predict
import torch
from numpy.typing import NDArray
from pydantic import Field
from records import UNALIGNED, Record, described, here, versions
from torch import nn

from kinds.base import NotReady, Outcome, Table
from kinds.sweeps import Swept, SweptCell, put
from toolchain.compress.method import Method
from toolchain.compress.stage import pruned_shares
from toolchain.cost import ModelShape, Widths, trace
from toolchain.data import DataSource, batches
from toolchain.devices.device import Devices
from toolchain.errors import ArtifactError, RecipeError
from toolchain.files import digest_of, exclusive, read_json, sha256, write_json
from toolchain.likelihood import CATEGORICAL
from toolchain.model import MaskedModel, run_stage
from toolchain.pipeline.job import Job, prepare
from toolchain.pipeline.latency_budget import latency_of
from toolchain.pipeline.stages.compress import compress
from toolchain.pipeline.stages.latency import clocks
from toolchain.progress import Progress
from toolchain.recipe import FinetuneSection, Recipe
from toolchain.surgery.replay import load_model, save_model
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.evaluate import Accuracy, accuracy
from toolchain.training.stages import Finetune

if TYPE_CHECKING:
    from engine import Bench
    from references import Ready
    from suite import File, Suite

Training = Literal["zero", "recovered"]
DECIDE = ("model", "data", "train", "compress", "budget", "finetune")
"""The sections of a recipe that a cell depends on; what is made of the model afterwards is not measured."""


class Group(Table):
    """Cells that share a name.

    Attributes:
        name: the first part of each cell's name.
        reference: which dense model they start from; "" where a cell needs no trained one.
        seeds: which of the reference's seeds; all by default.
        training: whether the cells are measured without training, after recovery, or both.
        settings: dotted recipe keys, or `peer.…`, that every cell has.
        grid: dotted key → values; the cells are the product.
        sweep: what the cells are tries of; a try is a cell like others, and is shown apart.
        best: sweeps whose best try gives this group the values of the sweep's grid.
    """

    name: str
    reference: str = ""
    seeds: tuple[int, ...] | None = None
    training: tuple[Training, ...] = ("zero",)
    settings: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    sweep: str = ""
    best: tuple[str, ...] = ()


@dataclass(frozen=True)
class CompressionCell(SweptCell):
    """One model to compress.

    Attributes:
        reference, seed, training: the dense model that it starts from, and whether it is trained after.
        settings: dotted key → value, the sweeps' choices not among them.
        tried: the part of `settings` that came from the grid.
    """

    reference: str = ""
    seed: int = 0
    training: Training = "zero"
    settings: Mapping[str, Any] = field(default_factory=dict)
    tried: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The name of the reference with its seed, which is the name of its folder."""
        return f"{self.reference}_s{self.seed}" if self.reference else ""

    @property
    def about(self) -> dict[str, Any]:
        """Its place in the suite, as a record has it."""
        names = ("row", "reference", "seed", "training", "sweep")
        return {**{name: getattr(self, name) for name in names}, "tried": dict(self.tried)}


class Compression(Swept[CompressionCell, Group]):
    """slimvit's own methods."""

    name = "compression"
    group = Group
    shared = True
    measures = "accuracy"
    """What it finds out, as its key has it."""

    def cells(self, group: Group, file: File, path: Path) -> list[CompressionCell]:
        """The product of a group's grid, training and seeds."""
        if group.reference and group.reference not in file.references:
            known = ", ".join(file.references)
            raise RecipeError(f"{path}: {group.name} starts from {group.reference!r}; known: {known}")
        usual, every = (0,), (0,)
        if group.reference:
            usual, every = file.references[group.reference].seeds, file.references[group.reference].all_seeds
        seeds = usual if group.seeds is None else group.seeds
        if not set(seeds) <= set(every):
            raise RecipeError(f"{path}: {group.name} wants seeds {seeds}; {group.reference} has {every}")
        cells = []
        for values in itertools.product(*group.grid.values()):
            tried = dict(zip(group.grid, values, strict=True))
            row = ".".join([group.name, *(f"{_key(key)}{_word(value)}" for key, value in tried.items())])
            for training, seed in itertools.product(group.training, seeds):
                name = f"{row}.{training}.{group.reference}_s{seed}" if group.reference else row
                settings = {**group.settings, **tried}
                own = (group.best, group.reference, seed, training, settings, tried)
                cells.append(CompressionCell(name, self.name, row, group.sweep, 0.0, *own))
        return cells

    def recipe(
        self, cell: CompressionCell, suite: Suite, chosen: Mapping[str, Any] | None = None, checkpoint: str = ""
    ) -> Recipe:
        """The recipe of a cell.

        Args:
            cell: which.
            suite: that it is of.
            chosen: what its sweeps gave; None where they are not known yet, and the defaults stand in for it.
            checkpoint: the reference's weights; "" leaves the reference's [train] in their place.
        """
        raw = copy.deepcopy(suite.file.references[cell.reference].recipe) if cell.reference else {}
        flat: dict[str, Any] = {"compress.seed": cell.seed, **(chosen or {}), **cell.settings}
        if checkpoint:
            raw.pop("train", None)
            flat |= {"model.checkpoint": checkpoint, "model.pretrained": False}
        if cell.training == "recovered":
            flat = {**{f"finetune.{key}": value for key, value in suite.file.recovery.items()}, **flat}
        trained = cell.training != "zero"
        put(
            raw,
            {key: value for key, value in self.recipe_keys(flat).items() if trained or not key.startswith("finetune.")},
        )
        if "latency" not in raw.get("budget", {}):  # no target says otherwise
            raw.setdefault("compress", {}).setdefault("align", UNALIGNED)
        return Recipe.from_dict(raw)

    def recipe_keys(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that are keys of a recipe."""
        return settings

    def other_settings(self, cell: CompressionCell, chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The settings that are another tool's, and its budget."""
        return {}

    def other_versions(self) -> dict[str, str]:
        """What a cell depends on besides slimvit, torch and timm."""
        return {}

    def best_values(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """What the best try of a sweep had."""
        values: Mapping[str, Any] = best_try(records).tried
        return values

    def key(self, cell: CompressionCell, bench: Bench, record: Record | None = None) -> str:
        """Digest of the recipe, the dense weights, another tool's settings and all versions.

        Where the dense model is not on this machine, it is the one that the record names: training is not the same to
        the bit on every processor, and a record does not lapse because its weights lie elsewhere.
        """
        chosen = self.chosen(cell, bench)
        weights = ""
        if cell.reference:
            ready = bench.ready(cell.reference, cell.seed)
            if ready is None and record is None:
                ready = bench.reference(cell.reference, cell.seed)
            weights = ready.weights_sha256 if ready else record.result["weights_sha256"] if record else ""
        recipe = self.recipe(cell, bench.suite, chosen, "elsewhere" if cell.reference else "")
        raw, extra = described(recipe), {**versions(), **self.other_versions(), "kind": self.measures}
        decides = {section: raw[section] for section in DECIDE}
        return digest_of("benchmark cell", decides, self.other_settings(cell, chosen), weights, extra)

    def definition(self, cell: CompressionCell, other: dict[str, Any]) -> dict[str, Any]:
        """The other's recipe at this cell's place."""
        return {**other, **cell.about}

    def measure(self, cell: CompressionCell, bench: Bench, progress: Progress) -> Outcome:
        """Compresses, recovers, slices and evaluates."""
        chosen, key = self.chosen(cell, bench), self.key(cell, bench)
        ready = bench.reference(cell.reference, cell.seed)
        recipe = self.recipe(cell, bench.suite, chosen, str(ready.weights))
        clock, job = Clock(), prepare(recipe)
        clock.lap("prepare")
        masked, facts, seconds = self.compressed(job, self.other_settings(cell, chosen), ready, bench.work, progress)
        clock.seconds |= seconds
        clock.skip()
        kept: str | None = None
        if cell.training == "recovered":
            scratch = bench.work / "scratch" / f"{key}.safetensors"
            seed = recipe.compress.seed
            dense = (job.source, job.dense, seed)
            stage = Finetune(recipe.finetune, *dense, checkpoint=scratch, key=key, progress=progress)
            after = run_stage(stage, masked).artifact
            masked, kept = after, "before" if after.module is masked.module else "after"
            clock.lap("recovery")
            scratch.unlink(missing_ok=True)
        module, shape = self.final(job, masked)
        clock.lap("slice")
        figures = evaluated(module, job.dense.module, job.source)
        clock.lap("evaluate")
        result = {
            "weights_sha256": ready.weights_sha256,
            "trained": ready.facts["trained"],
            "epochs": epochs(recipe),
            "labels": self.reads_labels(cell, recipe),
            "recovery_kept": kept,
            **cost(shape),
            "dense": cost(job.problem.shape),
            **figures,
            **facts,
        }
        definition = {**cell.about, "recipe": described(recipe), "peer": self.other_settings(cell, chosen)}
        return Outcome(definition, result, here(), {**versions(), **self.other_versions()}, clock.seconds)

    def reads_labels(self, cell: CompressionCell, recipe: Recipe) -> bool:
        """Whether any labels were read after the dense model was trained."""
        recovered = cell.training == "recovered" and recipe.finetune.labels
        return Method.of(recipe.compress).reads_labels or recovered

    def compressed(
        self, job: Job, settings: Mapping[str, Any], reference: Ready, work: Path, progress: Progress
    ) -> tuple[MaskedModel, dict[str, Any], dict[str, float]]:
        """(the model before recovery, facts, the seconds that it took): shared by all cells that begin alike."""
        raw = job.recipe.model_dump(mode="json")
        decides = {name: raw[name] for name in ("model", "data", "compress", "budget")}
        decides["model"] = {**decides["model"], "checkpoint": ""}
        key = digest_of("compressed", decides, reference.weights_sha256, versions())
        folder, scratch = work / "compressed" / key[:24], work / "scratch" / f"{key}.safetensors"
        with exclusive(folder):
            facts = folder.with_suffix(".json")
            if facts.is_file() and folder.is_dir():
                model, known = load_model(folder), read_json(facts)
                if isinstance(model, MaskedModel) and known["weights_sha256"] == sha256(folder / "model.safetensors"):
                    return model, known["facts"], known["seconds"]
            clock = Clock()
            dense = replace(job.dense, provenance={**job.dense.provenance, "weights_sha256": reference.weights_sha256})
            with Devices() as devices:
                latency = latency_of(clocks(job, dense, devices, progress))
                made = compress(job, dense, latency, checkpoint=scratch, key=key, progress=progress)
            masked, allocation = made.artifact, made.facts
            clock.lap("compress")
            times = allocation.to_dict()["latency"]
            about = {**_plan_facts(masked), **({"latency": times} if times else {})}
            save_model(masked, folder)
            weights = sha256(folder / "model.safetensors")
            write_json(facts, {"weights_sha256": weights, "facts": about, "seconds": clock.seconds})
        scratch.unlink(missing_ok=True)
        return masked, about, clock.seconds

    def final(self, job: Job, masked: MaskedModel) -> tuple[nn.Module, ModelShape]:
        """(the module that would be shipped, its shapes)."""
        module, shape = shaped(run_stage(Split(), run_stage(Slice(), masked).artifact).artifact.module, masked)
        if shape.params > job.problem.shape.params:
            raise ArtifactError(f"the compressed model has {shape.params:,} parameters, more than the dense one")
        return module, shape

    def predict(self, todo: Sequence[CompressionCell], bench: Bench, rate: float) -> dict[str, float]:
        """From MACs, or what recorded cells of the same kind took; a training that is missing has a line of its own."""
        every = (bench.results.read(bench.suite.name, cell.name) for cell in bench.suite.cells)
        known = recorded_seconds([r for r in every if r is not None and r.kind == self.name])
        seconds: dict[str, float] = {}
        sizes: dict[str, predict.Sizes] = {}
        begun: set[str] = set()
        for cell in todo:
            try:
                chosen = self.chosen(cell, bench)
            except NotReady:
                chosen = {}
            recipe = self.recipe(cell, bench.suite, chosen)
            alike = kind_of(described(recipe), self.other_settings(cell, chosen), cell.training)
            start = json.dumps([cell.model, described(recipe.model_copy(update={"finetune": FinetuneSection()}))])
            dense = bench.suite.reference_recipe(cell.reference, cell.seed) if cell.reference else recipe
            model = cell.reference or json.dumps(recipe.model.model_dump(mode="json"))
            if model not in sizes:
                sizes[model] = predict.Sizes.of(prepare(dense))
            repeated = start in begun and bool(cell.reference)
            begun.add(start)
            passes = predict.passes(recipe, epochs(recipe), sizes[model], compressed=repeated)
            seconds[cell.name] = known.get(alike) or predict.seconds(passes, sizes[model], rate)
            if cell.reference and bench.ready(cell.reference, cell.seed) is None:
                seconds[cell.model] = predict.training_seconds(dense, sizes[model], rate)
        return seconds

    def summary(self, record: Record) -> str:
        """Errors and parameters."""
        test = record.result["test"]
        return f"{test['wrong']} of {test['total']} wrong, {record.result['params']:,} params"


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


@dataclass(frozen=True)
class Try:
    """What one value of a sweep came to on validation, over all seeds that it was tried on."""

    tried: dict[str, Any]
    wrong: int
    total: int
    kl: float
    seeds: int


def tries_of(records: Sequence[Record]) -> list[Try]:
    """The tries of a sweep, in the order of their first records; errors are summed over seeds, the divergence averaged."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(record.definition["tried"], sort_keys=True), []).append(record)
    return [
        Try(
            tried=group[0].definition["tried"],
            wrong=sum(record.result["validation"]["wrong"] for record in group),
            total=sum(record.result["validation"]["total"] for record in group),
            kl=float(np.mean([record.result["validation"]["kl"] for record in group])),
            seeds=len(group),
        )
        for group in groups.values()
    ]


def best_try(records: Sequence[Record]) -> Try:
    """The try with the fewest errors on validation, then the least divergence from the dense model there.

    The test split is not looked at.
    """
    return min(tries_of(records), key=lambda each: (each.wrong, each.kl))


def pack(counted: Accuracy) -> dict[str, Any]:
    """{"total", "wrong", "correct"}: which images were right, one bit each, as base64 of big-endian bits."""
    right = (counted.predictions == counted.labels).numpy()
    bits = base64.b64encode(np.packbits(right).tobytes()).decode()
    return {"total": counted.total, "wrong": counted.wrong, "correct": bits}


def unpack(packed: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The inverse of `pack`: bool [total], True where the prediction was right; raises ValueError if the count is another."""
    bits = np.frombuffer(base64.b64decode(packed["correct"]), dtype=np.uint8)
    right = np.unpackbits(bits, count=packed["total"]).astype(bool)
    if int((~right).sum()) != packed["wrong"]:
        raise ValueError(f"{packed['wrong']} images are said to be wrong, the bits say {int((~right).sum())}")
    return right


def epochs(recipe: Recipe) -> dict[str, int]:
    """How often a method sees the training images, before and after it decides what to remove."""
    return {
        "gates": recipe.compress.vtp.epochs if recipe.compress.neurons == "vtp" else 0,
        "recovery": recipe.finetune.epochs,
    }


def kind_of(recipe: Mapping[str, Any], peer: Mapping[str, Any], training: str) -> str:
    """What cells that take about as long as each other have in common, as text."""
    section, model = recipe["compress"], recipe["model"]
    method = "peer" if peer else [section[name] for name in ("attention", "neurons", "allocation")]
    gates = section["vtp"]["epochs"] if section["neurons"] == "vtp" else 0
    after = recipe["finetune"]["epochs"] if training == "recovered" else 0
    data = [recipe["data"][name] for name in ("source", "calibration_images")]
    return json.dumps([model["name"], model["kwargs"], data, method, gates, after], sort_keys=True)


def recorded_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Kind → mean seconds of the recorded cells of that kind."""
    seen: dict[str, list[float]] = {}
    for record in records:
        definition = record.definition
        alike = kind_of(definition["recipe"], definition["peer"], definition["training"])
        # "load", which older records have, holds "compress" once more
        seconds = sum(spent for phase, spent in record.seconds.items() if phase != "load")
        seen.setdefault(alike, []).append(seconds)
    return {alike: statistics.mean(values) for alike, values in seen.items()}


def shaped(module: nn.Module, model: MaskedModel) -> tuple[nn.Module, ModelShape]:
    """(a module, its shapes); raises ArtifactError if these do not give the parameters that are there."""
    shape = trace(module, model.family, model.preprocess.input_size)
    left = sum(parameter.numel() for parameter in module.parameters())
    if shape.params != left:
        raise ArtifactError(f"the model has {left:,} parameters, its shapes give {shape.params:,}")
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


def _plan_facts(masked: MaskedModel) -> dict[str, Any]:
    widths, units = Widths.of(masked.plan), {}
    for group in masked.groups:
        units[group.unit] = units.get(group.unit, 0) + group.total * group.partitions
    return {
        "widths": [{"module": module, "unit": unit, "kept": kept} for (module, unit), kept in widths.kept.items()],
        "ranks": [{"linear": linear, "rank": rank} for linear, rank in widths.ranks.items()],
        "units": units,
        "pruned_shares": [row.model_dump() for row in pruned_shares(masked)],
        "closed_form": masked.plan.provenance["closed_form"],
        "plan_sha256": masked.plan.digest,
    }


def _key(key: str) -> str:
    last = key.rpartition(".")[2]
    return f"{last}_" if last[-1].isdigit() else last


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "_on" if value else "_off"
    return f"_{value}".replace("%", "pct") if isinstance(value, str) else str(value)


KIND = Compression()
