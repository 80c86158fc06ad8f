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

from toolchain.compress.allocation import Latency
from toolchain.compress.choices import Choices, Key
from toolchain.cost import RANK, LatencyTable, SavedLatency, Widths, trace
from toolchain.devices.transport import LocalTransport, Transport
from toolchain.errors import ArtifactError, StorageError
from toolchain.export.onnx_graph import export_onnx
from toolchain.files import digest_of, exclusive, read_json, user_cache, write_json, write_text
from toolchain.measure.intervals import block_log_ratios, slot_medians
from toolchain.measure.schedule import INPUT_SETS
from toolchain.model import IMAGE, DeployModel, TimmModel
from toolchain.on_device.runner import PLAN_SCHEMA, calls_per_slot
from toolchain.pipeline.cell import conditions
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.surgery.factorised import FactorisedLinear, replace_module
from toolchain.surgery.load import randomise_untrained
from toolchain.surgery.replay import save_model
from toolchain.surgery.slice import slice_module
from toolchain.surgery.split import split_module

SHARES = (0.0, 0.25, 0.5, 0.75)
"""The widths of a table, as shares of what a unit has; all of it is the dense model."""
SLOT_MS, WARM_UP_S = 50.0, 0.5
BLOCKS = (7, 21)
"""The fewest and the most blocks of a session."""
SESSION_S, CHECK_SESSIONS = 10.0, 3
"""What the blocks of one session may take, and how many fresh processes check the chosen widths."""
Told = Callable[[float, str], None]


@dataclass(frozen=True)
class Setting:
    """What is timed: target, batch and threads, and how files for it are exported."""

    target: str
    batch: int = 1
    threads: int = 1
    opset: int = 20
    simplify: bool = True


@dataclass(frozen=True)
class Timing:
    """Latency of the dense model in ms, of each variant as a share of it, and the machine."""

    dense_ms: float
    ratios: tuple[float, ...]
    environment: Mapping[str, Any]


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
    *,
    sessions: int = 1,
    told: Told = lambda *_: None,
    transport: Transport | None = None,
) -> Timing:
    """The dense model's latency and the variants' ratios to it: medians over paired, interleaved blocks.

    Args:
        dense: the model; left as it is.
        variants: what is timed beside it.
        setting: where and how.
        sessions: fresh processes, whose blocks are pooled.
        told: receives (share done, text).
        transport: where the sessions run; None is this machine.

    Raises:
        ArtifactError: a variant cannot be exported or opened.
        MeasurementError: a session failed.
    """
    transport = transport or LocalTransport()
    names = ["dense", *(f"variant{index}" for index in range(len(variants)))]
    with tempfile.TemporaryDirectory(prefix="slimvit-latency-") as folder:
        paths = []
        for index, widths in enumerate((Widths(), *variants)):
            told(0.5 * index / len(names), f"{setting.target}: preparing model {index + 1} of {len(names)}")
            paths.append(_written(variant_of(dense, widths), setting, Path(folder, names[index])))
        plan = _plan(setting, dense.preprocess.input_size, dict(zip(names, paths, strict=True)))
        alone = transport.run({**plan, "variants": plan["variants"][:1], "session": 0}, lambda *_: None)
        call_ns = float(alone["variants"]["dense"]["call_ns"])
        slot_s = max(SLOT_MS / 1e3, calls_per_slot(call_ns, SLOT_MS)[0] * call_ns / 1e9)
        plan["blocks"] = int(np.clip(SESSION_S / (slot_s * len(names)), *BLOCKS))
        results = []
        for session in range(sessions):

            def progress(share: float, _: str, session: int = session) -> None:
                told(0.5 + 0.5 * (session + share) / sessions, f"{setting.target}: timing {len(names)} models")

            results.append(transport.run({**plan, "session": session}, progress))
    slots = {name: [b["samples_ns"][name] for r in results for b in r["blocks"]] for name in names}
    ratios = tuple(float(np.exp(np.median(block_log_ratios(slots[name], slots["dense"])))) for name in names[1:])
    machine = results[0]["fingerprint"]["before"]["machine"]
    return Timing(float(np.median(slot_medians(slots["dense"]))) / 1e6, ratios, machine)


def _written(model: DeployModel, setting: Setting, path: Path) -> Path:
    """The artifact that the target times: a model folder for "eager", else an ONNX file."""
    if setting.target == "eager":
        return save_model(model, path)
    file = path.with_suffix(".onnx")
    size = model.preprocess.input_size
    export_onnx(model.module, file, input_size=size, opset=setting.opset, metadata={}, simplify=setting.simplify)
    return file


def _plan(setting: Setting, input_size: tuple[int, int, int], paths: Mapping[str, Path]) -> dict[str, Any]:
    """A session's plan for the device runner, but for its number; one block until the dense time is known."""
    tensor = {"shape": [setting.batch, *input_size], "dtype": "float32"}
    return {
        "schema": PLAN_SCHEMA,
        "seed": 0,
        "blocks": 1,
        "slot_ms": SLOT_MS,
        "threads": setting.threads,
        "warmup": {"calls": 10, "seconds": WARM_UP_S},
        "inputs": {"count": INPUT_SETS, "seed": 0, "tensors": [tensor]},
        "variants": [
            {"name": name, "path": str(path), "runtime": setting.target, "inputs": [IMAGE]}
            for name, path in paths.items()
        ],
    }


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


@dataclass(frozen=True)
class Clock:
    """Latency in one setting of one dense model, measured once and kept in the user's cache.

    Attributes:
        dense: the model; only its shapes matter.
        choices: what may be reduced.
        setting: where and how it is timed.
        told: receives (share done, text).
    """

    dense: TimmModel
    choices: Choices
    setting: Setting
    told: Told = field(default=lambda *_: None)

    @property
    def key(self) -> str:
        """Digest of all that the measurement depends on: shapes, widths, setting, runtime, exporter and machine."""
        shape = trace(self.dense.module, self.dense.family, self.dense.preprocess.input_size)
        versions = [version(name) for name in ("torch", "timm", "onnx", "onnxscript", "onnxsim")]
        model = [self.dense.ref.model_dump(mode="json"), asdict(shape), list(self.dense.preprocess.input_size)]
        where = conditions(self.setting.target, self.setting.threads)
        return digest_of(
            "latency", model, unit_classes(self.dense, self.choices), asdict(self.setting), versions, where
        )

    def folder(self) -> Path:
        """Where it is kept."""
        return user_cache() / "latency" / self.key

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
            found = time_widths(self.dense, [widths], self.setting, sessions=CHECK_SESSIONS, told=self.told)
            write_json(path, {"ratio": found.ratios[0], "dense_ms": found.dense_ms, "widths": record})
            return found.ratios[0]

    def _measured(self) -> LatencyTable:
        classes = [entry for entry in unit_classes(self.dense, self.choices) if entry[1]]
        curves, times, machine = [], [], {}
        for index, (members, widths, whole) in enumerate(classes):

            def told(share: float, text: str, index: int = index) -> None:
                self.told((index + share) / len(classes), text)

            variants = [self.choices.widths(dict.fromkeys(members, width)) for width in widths]
            found = time_widths(self.dense, variants, self.setting, told=told)
            saved = [(1 - ratio) / len(members) for ratio in found.ratios]
            falling = np.maximum.accumulate([0.0, *reversed(saved)])[::-1]  # wider never saves more; nothing below 0
            points = tuple(zip((*widths, whole), falling.tolist(), strict=True))
            curves.append(SavedLatency(members=members, points=points))
            times.append(found.dense_ms)
            machine = dict(found.environment)
        if not times:  # nothing that this method may reduce can be narrower
            times.append(time_widths(self.dense, [], self.setting, told=self.told).dense_ms)
        return LatencyTable(
            target=self.setting.target,
            batch=self.setting.batch,
            threads=self.setting.threads,
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
