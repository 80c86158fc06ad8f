"""Latency of widths: whole models of them, timed against the dense model, side by side in one process.

Weights do not matter for time, so a model of some widths is the dense one with the first positions of each unit kept.
It is exported like the model that ships: what the runtime fuses, and what its caches hold, counts. What was measured is
kept in the user's cache, so that `slimvit plan` and every run of a recipe on this machine decide by the same figures.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.artifacts import InputSpec, Signature
from toolchain.artifacts.model_folder import ModelFolder
from toolchain.compress.allocation import Latency
from toolchain.compress.choices import Choices, Key
from toolchain.cost import RANK, LatencyTable, SavedLatency, Widths, trace
from toolchain.devices.device import Device, probe
from toolchain.devices.targets_toml import named_target
from toolchain.errors import ArtifactError, MeasurementError, StorageError
from toolchain.export.onnx_graph import export_onnx
from toolchain.files import digest_of, exclusive, read_json, user_cache, write_json, write_text
from toolchain.measure.experiment import Experiment, TimedArtifact, scenario_of
from toolchain.measure.intervals import block_log_ratios, slot_medians
from toolchain.measure.sampled import require_sessions
from toolchain.measure.samples import Design, Workload
from toolchain.measure.session import sessions_of
from toolchain.model import IMAGE, DeployModel, TimmModel
from toolchain.on_device.runner import calls_per_slot
from toolchain.pipeline.cell import conditions_of
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.progress import SILENT, Progress
from toolchain.surgery.factorised import FactorisedLinear, replace_module
from toolchain.surgery.load import randomise_untrained
from toolchain.surgery.replay import save_model
from toolchain.surgery.slice import slice_module
from toolchain.surgery.split import split_module
from toolchain.targets import get_target

SHARES = (0.0, 0.25, 0.5, 0.75)
"""The widths of a table, as shares of what a unit has; all of it is the dense model."""
DESIGN = Design(sessions=1, blocks=21, looks=1)
"""The design of a table's session; `blocks` is the maximum."""
FEWEST_BLOCKS, SESSION_S = 7, 10.0
"""A session has fewer blocks than `DESIGN`, but never fewer than these, where all would take longer than these seconds."""
LOOK = {"sessions": 1, "blocks": 1, "looks": 1}
"""Changes of the design for the session that only finds how long a call of the dense model takes."""
CHECK_SESSIONS = 3
"""Number of fresh processes in which the chosen widths are timed."""


@dataclass(frozen=True)
class Setting:
    """Where widths are timed, what a call is, and how files for it are exported."""

    device: Device
    workload: Workload = Workload()
    opset: int = 20
    simplify: bool = True

    @property
    def target(self) -> str:
        """The device's name in the budget."""
        return self.device.name


@dataclass(frozen=True)
class Timing:
    """Latency of the dense model in ms, of each variant as a share of it, and the machine."""

    dense_ms: float
    ratios: tuple[float, ...]
    environment: Mapping[str, object]


def variant_of(dense: TimmModel, widths: Widths) -> DeployModel:
    """A model of some widths whose weights mean nothing: the first positions of each unit, random low-rank factors."""
    module = copy.deepcopy(dense.module)
    randomise_untrained(module, 0)  # a bias of zeros would be folded away, whatever the model's real ones are
    generator, lows, keeps = torch.Generator().manual_seed(0), [], []
    for name, rank in widths.ranks.items():
        pair = FactorisedLinear.like(module.get_submodule(name), rank)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in pair.parameters():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        lows.append(LowRank(module=name, shape=(pair.up.out_features, pair.down.in_features), rank=rank))
        replace_module(module, name, pair)
    for group in dense.groups:
        kept = widths.kept.get((group.module, group.unit), group.total)
        if group.sliceable and kept < group.total:
            parts = (tuple(range(kept)),) * group.partitions
            keeps.append(Keep(module=group.module, unit=group.unit, total=group.total, indices=parts))
    plan = CompressionPlan(model=dense.ref, keeps=tuple(keeps), low_ranks=tuple(lows))
    slice_module(module, plan, dense.groups)
    split_module(module, dense.family)
    return DeployModel(dense.ref, module, dense.family, dense.groups, dense.preprocess, {"timing": True}, plan=plan)


def time_widths(
    dense: TimmModel,
    variants: Sequence[Widths],
    setting: Setting,
    design: Design = DESIGN,
    progress: Progress = SILENT,
) -> Timing:
    """The dense model's latency and the variants' ratios to it: medians over paired, interleaved blocks.

    Args:
        dense: the model; left as it is.
        variants: what is timed beside it.
        setting: where and what.
        design: how; the blocks of its sessions are pooled.
        progress: gets progress reports.

    Raises:
        ArtifactError: a variant cannot be exported or opened.
        MeasurementError: a session failed, or the machine changed between sessions.
    """
    device, workload = setting.device, setting.workload
    names = ["dense", *(f"variant{index}" for index in range(len(variants)))]
    spec = InputSpec(shape=(workload.batch, *dense.preprocess.input_size), dtype="float32")
    scenario, signature = scenario_of(device.runtime, workload, (spec,)), Signature((IMAGE,), (spec,))
    with tempfile.TemporaryDirectory(prefix="slimvit-latency-") as folder:
        files = {}
        for index, (name, widths) in enumerate(zip(names, (Widths(), *variants), strict=True)):
            progress.at(0.5 * index / len(names), f"{setting.target}: preparing model {index + 1} of {len(names)}")
            path = _written(variant_of(dense, widths), setting, Path(folder, name))
            files[name] = TimedArtifact(path, device.runtime, signature)
        look = Experiment(scenario, design.model_copy(update=LOOK), {"dense": files["dense"]})
        (alone,) = sessions_of(look, device.measurer, SILENT)
        call_ns = alone.variants["dense"].call_ns
        slot_s = max(design.slot_ms / 1e3, calls_per_slot(call_ns, design.slot_ms)[0] * call_ns / 1e9)
        fitting = max(FEWEST_BLOCKS, int(SESSION_S / (slot_s * len(names))))
        design = design.model_copy(update={"blocks": min(design.blocks, fitting)})
        timing = progress.part(0.5, 1.0, f"{setting.target}: timing {len(names)} models")
        sessions = list(sessions_of(Experiment(scenario, design, files), device.measurer, timing))
    try:
        require_sessions(sessions, design, scenario, names)
    except ValueError as error:
        raise MeasurementError(f"the latency of widths on {device.name}: {error}") from None
    slots = {name: [slot for session in sessions for slot in session.slots_ns(name)] for name in names}
    ratios = tuple(float(np.exp(np.median(block_log_ratios(slots[name], slots["dense"])))) for name in names[1:])
    machine = sessions[0].fingerprint.before.machine
    return Timing(float(np.median(slot_medians(slots["dense"]))) / 1e6, ratios, machine)


def _written(model: DeployModel, setting: Setting, path: Path) -> Path:
    """The artifact that the target times: a model folder for "eager", else an ONNX file."""
    if ModelFolder.name in get_target(setting.device.runtime).takes:
        return save_model(model, path)
    file = path.with_suffix(".onnx")
    size = model.preprocess.input_size
    export_onnx(
        model.module,
        file,
        input_size=size,
        opset=setting.opset,
        metadata={},
        simplify=setting.simplify,
        outputs=model.output_names,
    )
    return file


def unit_classes(dense: TimmModel, choices: Choices) -> list[tuple[tuple[Key, ...], tuple[int, ...], int]]:
    """(equal units, the widths that are measured, the width at which nothing is saved): one entry for each class.

    Units are equal if they have one name, one size and linears of equal shapes; in a ViT all blocks are alike.
    """
    classes: dict[tuple[Any, ...], list[Key]] = {}
    ladders: dict[Key, tuple[tuple[int, ...], int]] = {}
    for group in choices.groups:
        key = (group.module, group.unit)
        shapes = tuple(tuple(dense.module.get_submodule(s.linear).weight.shape) for s in group.spans)  # type: ignore[arg-type]
        classes.setdefault((group.unit, group.total, group.partitions, shapes), []).append(key)
        widths = {choices.kept(group, share * group.total) for share in SHARES} - {group.total}
        ladders[key] = tuple(sorted(widths)), group.total
    for name, (out, into) in choices.linears.items():
        key = (name, RANK)
        classes.setdefault((RANK, name.rpartition(".")[2], out, into), []).append(key)
        pays = -(-out * into // (out + into))  # the lowest rank at which a pair is merged back into one linear
        ranks = {choices.ranks(share)[name] for share in SHARES}
        ladders[key] = tuple(sorted(rank for rank in ranks if rank < pays)), pays
    return [(tuple(members), *ladders[members[0]]) for members in classes.values()]


Timer = Callable[[TimmModel, Sequence[Widths], Setting, Design, Progress], Timing]


@dataclass(frozen=True)
class Clock:
    """Latency in one setting of one dense model, measured once and kept in the user's cache.

    Attributes:
        dense: the model; only its shapes matter.
        choices: what may be reduced.
        setting: where and how it is timed.
        progress: gets progress reports.
        timer: times some widths, as `time_widths` does.
    """

    dense: TimmModel
    choices: Choices
    setting: Setting
    progress: Progress = SILENT
    timer: Timer = field(default_factory=lambda: time_widths)

    @property
    def key(self) -> str:
        """Digest of all that the measurement depends on: shapes, widths, setting, runtime, exporter and machine."""
        shape = trace(self.dense.module, self.dense.family, self.dense.preprocess.input_size)
        versions = [version(name) for name in ("torch", "timm", "onnx", "onnxscript", "onnxsim")]
        model = [self.dense.ref.model_dump(mode="json"), asdict(shape), list(self.dense.preprocess.input_size)]
        setting = self.setting
        what = [setting.target, setting.device.runtime, asdict(setting.workload), setting.opset, setting.simplify]
        where = conditions_of(setting.target, setting.workload.threads)
        return digest_of("latency", model, unit_classes(self.dense, self.choices), what, versions, where)

    def folder(self) -> Path:
        """Where it is kept: of a device elsewhere, what answers there now; raises TargetUnavailable if nothing does."""
        if self.setting.device.is_here:
            return user_cache() / "latency" / self.key
        info = probe(self.setting.target, named_target(self.setting.target))
        return user_cache() / "latency" / digest_of(self.key, [info.runtime, info.version, info.device])

    def forget(self) -> None:
        """Removes what was kept, so that all is measured anew."""
        folder = self.folder()
        with exclusive(folder):
            for path in folder.glob("*.json"):
                path.unlink(missing_ok=True)

    def table(self) -> LatencyTable:
        """What each class of units saves: its units narrowed alike in all blocks, the saving divided by their number."""
        path = self.folder() / "table.json"
        with exclusive(self.folder()):
            with contextlib.suppress(OSError, ArtifactError):
                return LatencyTable.from_json(path.read_text(encoding="utf-8"))
            table = self._measured()
            write_text(path, table.to_json())
            return table

    def ratio(self, widths: Widths) -> float:
        """Measured time of a model of these widths over the dense model's, from several fresh processes."""
        record = [sorted([*key, count] for key, count in widths.kept.items()), sorted(widths.ranks.items())]
        path = self.folder() / f"check-{digest_of(record)[:24]}.json"
        with exclusive(self.folder()):
            with contextlib.suppress(StorageError, ArtifactError, KeyError, TypeError, ValueError):
                return float(read_json(path)["ratio"])
            design = DESIGN.model_copy(update={"sessions": CHECK_SESSIONS})
            timing = self.timer(self.dense, [widths], self.setting, design, self.progress)
            write_json(path, {"ratio": timing.ratios[0], "dense_ms": timing.dense_ms, "widths": record})
            return timing.ratios[0]

    def _measured(self) -> LatencyTable:
        classes = [entry for entry in unit_classes(self.dense, self.choices) if entry[1]]
        curves, times, machine = [], [], {}
        for index, (members, widths, whole) in enumerate(classes):
            part = self.progress.step(index, len(classes))
            variants = [self.choices.widths(dict.fromkeys(members, width)) for width in widths]
            timing = self.timer(self.dense, variants, self.setting, DESIGN, part)
            saved = [(1 - ratio) / len(members) for ratio in timing.ratios]
            falling = np.maximum.accumulate([0.0, *reversed(saved)])[::-1]  # wider never saves more; nothing below 0
            points = tuple(zip((*widths, whole), falling.tolist(), strict=True))
            curves.append(SavedLatency(members=members, points=points))
            times.append(timing.dense_ms)
            machine = dict(timing.environment)
        if not times:  # nothing that this method may reduce can be narrower
            times.append(self.timer(self.dense, [], self.setting, DESIGN, self.progress).dense_ms)
        return LatencyTable(
            target=self.setting.target,
            batch=self.setting.workload.batch,
            threads=self.setting.workload.threads,
            dense_ms=float(np.median(times)),
            saved=tuple(curves),
            environment=machine,
        )


def latency_of(clocks: Iterable[Clock], tables: Sequence[LatencyTable] | None = None) -> Latency:
    """What compression needs to hold latency limits: the tables, and a check by the same clocks.

    Args:
        clocks: one for each target of the budget.
        tables: those of the clocks, where they were read before.
    """
    clocks = list(clocks)
    tables = [clock.table() for clock in clocks] if tables is None else tables

    def check(widths: Widths) -> dict[str, float]:
        return {clock.setting.target: clock.ratio(widths) for clock in clocks}

    return Latency(tuple(tables), check if clocks else None)
