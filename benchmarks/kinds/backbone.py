"""A pretrained backbone, compressed, and judged by its features on pictures of other scenes than those that it was shown.

Compressing happens in a process of its own, whose seconds and memory are recorded; recovery and judging follow here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import compressing
import inputs
import predict
import shipped
import torch
from inputs import Inputs
from judging import Pictures, by_image, judged, maps_of, packed, relative, small_map, thumbnail, tokens_of
from pydantic import Field
from records import Record, described, here, versions
from torch import Tensor, nn

from kinds import torch_pruning
from kinds.base import Outcome, Table
from kinds.compression import Clock, cost, shaped
from kinds.peer import PREFIX
from kinds.sweeps import Swept, SweptCell, put
from toolchain.cost import ModelShape
from toolchain.data import DataSource, Images
from toolchain.errors import RecipeError
from toolchain.files import digest_of
from toolchain.model import DeployModel, MaskedModel, TimmModel, run_stage
from toolchain.pipeline.job import Job, prepare
from toolchain.progress import Progress
from toolchain.recipe import Recipe
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.training.evaluate import accuracy
from toolchain.training.features import bank_of, voted
from toolchain.training.stages import Finetune

if TYPE_CHECKING:
    from engine import Bench
    from suite import File, Suite

Training = Literal["zero", "recovered"]
Task = Literal["features", "tokens", "probe"]
SETS = ("judge", "drawings")
"""What a cell is judged on; a try of a sweep on the tuning set alone."""
TUNING = "tuning"
DECIDE = ("data", "compress", "budget", "finetune")
"""The sections of a recipe that a cell depends on; of [model] it is the task and the weights."""
EFFICIENCY = 0.8
"""Share of the matmul rate that a backbone of this size reaches, assumed."""


PASSES = 12
"""Forward passes over the calibration images that compressing costs, about: damage, statistics, and all that is solved."""
JUDGED, TUNED, MACS, SEARCH_S = 360, 60, 6.1e9, 15.0
"""Images that a cell and a try are judged on, MACs of one of them, and seconds in which a pruning ratio is found; for predictions."""


class Group(Table):
    """Cells that share a name.

    Attributes:
        name: the first part of each cell's name.
        task: what the outputs are: the class token, all tokens, or the logits of a linear probe on the labelled data.
        training: without training, after recovery, or both.
        peer: whether Torch-Pruning prunes.
        precisions: of the ONNX files that are judged in the module's place, whose output is all tokens; "" judges the module.
        settings, grid, sweep, best: as of compression cells.
    """

    name: str
    task: Task = "features"
    training: tuple[Training, ...] = ("zero",)
    peer: bool = False
    precisions: tuple[str, ...] = ("",)
    settings: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    sweep: str = ""
    best: tuple[str, ...] = ()


@dataclass(frozen=True)
class BackboneCell(SweptCell):
    """One backbone to compress; else as `Group`.

    Attributes:
        tried: the part of `settings` that came from the grid.
    """

    task: Task = "features"
    training: Training = "zero"
    peer: bool = False
    precision: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    tried: Mapping[str, Any] = field(default_factory=dict)


class Backbone(Swept[BackboneCell, Group]):
    """Compresses, recovers and judges.

    Attributes:
        inputs: folder → what cells work on, fetched there unless it is there.
    """

    name = "backbone"
    group = Group

    def __init__(self, inputs: Callable[[Path], Inputs] = inputs.pretrained) -> None:
        self.inputs = inputs
        self._given: dict[Path, Inputs] = {}
        self._dense: dict[tuple[Path, str], Tensor] = {}

    def cells(self, group: Group, file: File, path: Path) -> list[BackboneCell]:
        """The product of a group's grid, precisions and training; raises RecipeError for files of other outputs than tokens."""
        if any(group.precisions) and (group.task != "tokens" or group.peer):
            raise RecipeError(f"{path.name}: {group.name} has precisions, which need task = 'tokens' and no peer")
        cells = []
        for values, precision in itertools.product(itertools.product(*group.grid.values()), group.precisions):
            tried = dict(zip(group.grid, values, strict=True))
            words = [f"{key.rpartition('.')[2]}{_word(value)}" for key, value in tried.items()]
            row = ".".join(filter(None, [group.name, group.task, *words, precision]))
            for training in group.training:
                how = (group.best, group.task, training, group.peer, precision, {**group.settings, **tried}, tried)
                cells.append(BackboneCell(f"{row}.{training}", self.name, row, group.sweep, 0.0, *how))
        return cells

    def best_values(self, records: Sequence[Record]) -> Mapping[str, Any]:
        """What the best try of a sweep had."""
        values: Mapping[str, Any] = best_try(records).definition["tried"]
        return values

    def recipe(self, cell: BackboneCell, suite: Suite, given: Inputs | None, chosen: Mapping[str, Any]) -> Recipe:
        """The recipe of a cell; without inputs all but the places of its model and its data."""
        model: dict[str, Any] = {"name": "backbone", "checkpoint": "weights", "pretrained": False}
        source = "none"
        if given is not None:
            model, source = given.model_of(cell.task), given.labelled if cell.task == "probe" else given.source
        raw: dict[str, Any] = {"model": model, "data": {"source": source, "calibration_images": compressing.SEEN}}
        flat = {**chosen, **cell.settings}
        if cell.training == "recovered":
            recovery = {f"finetune.{key}": value for key, value in suite.file.recovery.items()}
            flat = {**recovery, "finetune.labels": False, **flat}
        if cell.peer:
            flat = {key: value for key, value in flat.items() if not key.startswith((PREFIX, "budget."))}
            flat["compress.method"] = "none"
        trained = cell.training != "zero"
        put(raw, {key: value for key, value in flat.items() if trained or not key.startswith("finetune.")})
        return Recipe.from_dict(raw)

    def placeless(self, cell: BackboneCell, suite: Suite, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """The sections of the recipe that decide, but for the places of the model and the data."""
        raw = described(self.recipe(cell, suite, None, chosen))
        source = "labelled" if cell.task == "probe" else "pictures"
        return {**{name: raw[name] for name in DECIDE}, "data": {**raw["data"], "source": source}}

    def peer_settings(self, cell: BackboneCell, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Torch-Pruning's settings and its budget; nothing for slimvit's own methods."""
        if not cell.peer:
            return {}
        flat = {**chosen, **cell.settings}
        own = {key.removeprefix(PREFIX): value for key, value in flat.items() if key.startswith(PREFIX)}
        return {**own, "params": flat["budget.params"]}

    def key(self, cell: BackboneCell, bench: Bench, record: Record | None = None) -> str:
        """Digest of the recipe, the weights, the pictures, another tool's settings and all versions.

        Of a record the weights and pictures are those that it names: it does not lapse because they lie elsewhere.
        """
        chosen = self.chosen(cell, bench)
        decides, settings = self.placeless(cell, bench.suite, chosen), self.peer_settings(cell, chosen)
        if record is None:
            weights, pictures = self.of(bench).weights_sha256, self.of(bench).digest
        else:
            weights, pictures = (record.result[name] for name in ("weights_sha256", "pictures_sha256"))
        also = [torch_pruning.peer_version() if cell.peer else {}]
        also += [cell.precision, shipped.file_versions()] if cell.precision else []
        return digest_of(
            "backbone", decides, cell.task, bool(cell.sweep), settings, weights, pictures, versions(), *also
        )

    def of(self, bench: Bench) -> Inputs:
        """What cells work on, fetched when it is first asked for."""
        folder = bench.work / "real"
        if folder not in self._given:
            self._given[folder] = self.inputs(folder)
        return self._given[folder]

    def predict(self, todo: Sequence[BackboneCell], bench: Bench, rate: float) -> dict[str, float]:
        """The seconds that each cell took when it was recorded last, else an estimate from MACs.

        Some work is done once and used by several cells, such as a compressed model that one of them recovers: the first pays for it.
        """
        seconds: dict[str, float] = {}
        done = [cell for cell in bench.suite.cells if isinstance(cell, BackboneCell) and cell not in todo]
        begun: set[tuple[Any, ...]] = {("compressed", *alike(cell)) for cell in done}

        def first(*what: Any) -> bool:
            return what not in begun and not begun.add(what)

        for cell in todo:
            old = bench.results.read(bench.suite.name, cell.name)
            share = cell.settings.get("budget.params", 1.0)
            images = share * (TUNED if cell.sweep else JUDGED)
            if first("dense", "probe" if cell.task == "probe" else "pictures"):
                images += JUDGED
            if cell.peer and first("gradients", str(cell.settings.get("peer.loss", ""))) and not cell.best:
                images += compressing.SEEN * predict.FORWARD_AND_BACKWARD
            dense = cell.settings.get("compress.method") == "none"
            searching = not dense and first("compressed", *alike(cell))
            if searching and not cell.peer:
                images += PASSES * compressing.SEEN
            if cell.training == "recovered":
                images += compressing.SEEN * (share * predict.FORWARD_AND_BACKWARD + predict.TEACHER)
            known = None if old is None else sum(old.seconds.values())
            seconds[cell.name] = known or images * MACS / (rate * EFFICIENCY) + SEARCH_S * (searching and cell.peer)
        return seconds

    def measure(self, cell: BackboneCell, bench: Bench, progress: Progress) -> Outcome:
        """Raises RuntimeError with the last lines of the process that compresses if it fails."""
        chosen, given, clock = self.chosen(cell, bench), self.of(bench), Clock()
        recipe, settings = self.recipe(cell, bench.suite, given, chosen), self.peer_settings(cell, chosen)
        job = compressing.narrowed(prepare(recipe))
        clock.lap("prepare")
        made, facts = compressing.unplanned(job.dense, job.dense.module, "none"), compressing.NOTHING
        if settings or recipe.compress.method != "none":
            made, facts = compressing.compressed(recipe, job, settings, bench.work)
        clock.skip()
        seconds, kept = {**clock.seconds, **facts["seconds"]}, None
        if cell.training == "recovered":
            stage = Finetune(recipe.finetune, job.source, job.dense, recipe.compress.seed, progress=progress)
            after = run_stage(stage, made).artifact
            made, kept = after, "before" if after.module is made.module else "after"
            clock.lap("recovery")
        final, shape = self.final(made)
        clock.lap("slice")
        with TemporaryDirectory() as folder:
            about, tokens = dict[str, Any](), partial(tokens_of, final.module)
            if cell.precision:
                file = shipped.written(final, job, cell.precision, Path(folder))
                about, tokens = {"file": file.facts}, file.tokens
                clock.lap("file")
            figures = self.judge(cell, final.module, tokens, job, given, bench.work)
        clock.lap("judge")
        result = {
            "weights_sha256": given.weights_sha256,
            "pictures_sha256": given.digest,
            "seen": {name: len(job.source.split(name)) for name in ("calibration", "validation", "train")},
            "labels": cell.peer and torch_pruning.Settings.of(settings).loss == "labels",
            "recovery_kept": kept,
            **cost(shape),
            "dense": cost(job.problem.shape),
            **{name: facts[name] for name in ("peak_bytes", "peak_bytes_loaded", "chosen")},
            **about,
            **figures,
        }
        definition = {
            **{name: getattr(cell, name) for name in ("row", "task", "training", "peer", "sweep")},
            **({"precision": cell.precision} if cell.precision else {}),
            "tried": dict(cell.tried),
            "recipe": self.placeless(cell, bench.suite, chosen),
            "settings": settings,
        }
        known = {**versions(), **(torch_pruning.peer_version() if cell.peer else {})}
        known |= shipped.file_versions() if cell.precision else {}
        return Outcome(definition, result, here(), known, {**seconds, **clock.seconds})

    def final(self, made: MaskedModel) -> tuple[TimmModel | DeployModel, ModelShape]:
        """(the model that would be shipped, its shapes)."""
        if made.plan.keeps or made.plan.low_ranks:
            model: TimmModel | DeployModel = run_stage(Split(), run_stage(Slice(), made).artifact).artifact
        else:
            about = (made.family, made.groups, made.preprocess, made.provenance)
            model = TimmModel(made.ref, made.module.eval(), *about)
        return model, shaped(model.module, made)[1]

    def judge(
        self,
        cell: BackboneCell,
        module: nn.Module,
        tokens: Callable[[Images], Tensor],
        job: Job,
        given: Inputs,
        work: Path,
    ) -> dict[str, Any]:
        """The figures of what gives these tokens: on pictures, or those of the probe."""
        if cell.task == "probe":
            return probed(module, job, given, every=not cell.sweep)
        sets, figures = {}, {}
        for name in (TUNING,) if cell.sweep else (*SETS, TUNING):
            pictures = Pictures.of(given.pictures / name, job.dense.preprocess)
            dense = self.dense(name, pictures, job.dense.module, work)
            itself = module is job.dense.module and not cell.precision
            ours = dense if itself else tokens(pictures.images)
            sets[name] = {"names": list(pictures.names), **judged(ours, dense, pictures.images.labels)}
            if name == "judge":
                maps = maps_of(given.decode, ours)
                sets[name]["saliency"] = by_image(maps, maps_of(given.decode, dense))
                shown = [(at, each) for at, each in enumerate(pictures.names) if each in given.shown]
                figures["maps"] = {each: small_map(maps[at]) for at, each in shown}
                if itself:
                    figures["thumbnails"] = {each: thumbnail(pictures.paths[at]) for at, each in shown}
        return {"sets": sets, **figures}

    def dense(self, name: str, pictures: Pictures, module: nn.Module, work: Path) -> Tensor:
        """The dense model's tokens on a set, computed once."""
        if (work, name) not in self._dense:
            self._dense[work, name] = tokens_of(module, pictures.images)
        return self._dense[work, name]

    def summary(self, record: Record) -> str:
        """Errors and parameters."""
        size = f"{record.result['params'] / record.result['dense']['params']:.1%} of the parameters"
        if "probe" in record.result:
            test = record.result["probe"].get("test") or record.result["probe"]["validation"]
            return f"{size}, {test['wrong']} of {test['total']} wrong"
        return f"{size}, " + "; ".join(
            f"{name}: class {relative(each['class']):.3f}, patches {relative(each['patches']):.3f}"
            for name, each in record.result["sets"].items()
        )


def alike(cell: BackboneCell) -> tuple[Any, ...]:
    """What cells have in common that share a compressed model: all that is not about training."""
    settings = {key: value for key, value in cell.settings.items() if not key.startswith("finetune.")}
    return (cell.task, cell.peer, cell.sweep if cell.peer else "", json.dumps(settings, sort_keys=True))


def best_try(records: Sequence[Record]) -> Record:
    """The try with the least error of the class token on the tuning set, or with the fewest errors of the probe on validation."""

    def badness(record: Record) -> float:
        if "probe" in record.result:
            return float(record.result["probe"]["validation"]["wrong"])
        return relative(record.result["sets"][TUNING]["class"])

    return min(records, key=badness)


def probed(module: nn.Module, job: Job, given: Inputs, *, every: bool) -> dict[str, Any]:
    """Errors of the classifier on validation images, and if wanted on test images, there with votes of neighbours and features.

    The validation images are others than those that the method saw, which are the job's.
    """
    whole = prepare(job.recipe).source
    check = unseen(whole.split("validation"), job.source).spread(given.tell)
    result: dict[str, Any] = {"validation": packed(_right(module, check))}
    if every:
        test, bank = whole.split("test").spread(given.tell), whole.split("train").spread(given.bank)
        searched, k = bank_of(bank, given.bank)
        vectors, queries = (tokens_of(module, images)[:, 0] for images in (searched, test))
        dense = tokens_of(job.dense.module, test)[:, 0]
        votes = voted(queries, vectors, searched.labels, k) == test.labels
        errors = judged(queries[:, None], dense[:, None], torch.full((len(test),), -1))["class"]
        result |= {"test": packed(_right(module, test)), "neighbours": {"k": k, **packed(votes)}, "class": errors}
    return {"probe": result}


def unseen(images: Images, source: DataSource) -> Images:
    """Those of a data set's images that are neither in calibration nor in validation of a part of the same data set."""
    seen = torch.cat([source.split(name).positions for name in ("calibration", "validation")])
    return images.take(torch.nonzero(~torch.isin(images.positions, seen))[:, 0])


def _right(module: nn.Module, images: Images) -> Tensor:
    counted = accuracy(module, images, batch_size=32)
    return counted.predictions == counted.labels


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "_on" if value else "_off"
    return f"_{value}" if isinstance(value, str) else str(value)


KIND = Backbone()
