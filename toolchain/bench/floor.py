"""How close a latency is to the limit: the time of the matrix products alone, on this machine and in the same run.

The rate of the products is measured in the runtime itself, for the model's own shapes, with the model's own weights and
the same threads: another library's rate would bound what another runtime could do. Models and products take turns in
one process, block by block, so what slows the machine down slows both, and the share of one in the other is paired.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from toolchain.bench.environment import machine_changes
from toolchain.bench.intervals import Floats, Interval, median_interval, slot_medians
from toolchain.bench.plan import INPUT_SETS
from toolchain.bench.products import Graph, Product, products, read_graph, write_products
from toolchain.bench.products_runner import OPENERS, PREFIX
from toolchain.bench.samples import Session, explain
from toolchain.bench.signature import Signature, read_signature
from toolchain.bench.transport import LocalTransport, Transport
from toolchain.errors import MeasurementError, ParityError, RecipeError
from toolchain.targets import get_target
from toolchain.targets.device_runner import PLAN_SCHEMA

SCHEMA = "slimvit.floor/1"
ALONE = " alone"


@dataclass(frozen=True)
class Limit:
    """One model beside its products.

    Attributes:
        name: of the file.
        products: by shape, the costliest first.
        variants: for each of them, its name in `sessions`.
        variant: the model's name in `sessions`; the name of all its products in one file is `ALONE` after it.
        sessions: raw samples.
        seed: of the bootstrap.
    """

    name: str
    products: tuple[Product, ...]
    variants: tuple[str, ...]
    variant: str
    sessions: tuple[Session, ...]
    seed: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return sum(product.total_macs for product in self.products)

    @property
    def latency_ms(self) -> float:
        """The model's median time."""
        return float(np.median(np.concatenate(self.times_ns))) / 1e6

    @property
    def floor_ms(self) -> float:
        """The median time of all its products in one file, alone."""
        return float(np.median(np.concatenate(self._floors_ns))) / 1e6

    @cached_property
    def share(self) -> Interval:
        """ln(time of the products / latency) with its interval: how much of the limit is reached."""
        pairs = zip(self._floors_ns, self.times_ns, strict=True)
        return median_interval([np.log(floor / time) for floor, time in pairs], seed=self.seed)

    @property
    def product_ms(self) -> list[float]:
        """For each shape, the median time of its products in a file of their own; to tell which shapes run badly.

        Each file pays for a call of the runtime, so their sum is above the floor where a call takes microseconds.
        """
        return [float(np.median(np.concatenate(self._slots(name)))) / 1e6 for name in self.variants]

    @property
    def times_ns(self) -> list[Floats]:
        """The model's slot medians, for each session [blocks]."""
        return self._slots(self.variant)

    @property
    def _floors_ns(self) -> list[Floats]:
        return self._slots(self.variant + ALONE)

    def _slots(self, variant: str) -> list[Floats]:
        return [slot_medians(session.slots_ns(variant)) for session in self.sessions]

    def to_dict(self) -> dict[str, Any]:
        """What a reader wants; the samples are not in it."""
        rows = [
            {
                "product": str(product),
                "dtype": product.dtype,
                "count": product.count,
                "macs": product.total_macs,
                "ms": ms,
                "gmacs_per_s": product.total_macs / ms / 1e6,
            }
            for product, ms in zip(self.products, self.product_ms, strict=True)
        ]
        return {
            "name": self.name,
            "macs": self.macs,
            "latency_ms": self.latency_ms,
            "floor_ms": self.floor_ms,
            "gmacs_per_s": self.macs / self.floor_ms / 1e6,
            "share_of_floor": self.share.to_ratio(),
            "products": rows,
        }


@dataclass(frozen=True)
class Floor:
    """The limits of one or two models, measured side by side."""

    target: str
    threads: int
    batch: int
    a: Limit
    b: Limit | None
    sessions: tuple[Session, ...]
    seed: int = 0

    @cached_property
    def ratio(self) -> Interval | None:
        """ln(time of B / time of A), or None without a B. The verified figure is that of `compare`, with its control."""
        if self.b is None:
            return None
        pairs = zip(self.b.times_ns, self.a.times_ns, strict=True)
        return median_interval([np.log(b / a) for b, a in pairs], seed=self.seed)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `bench floor --json`, with the raw samples."""
        both = {} if self.b is None or self.ratio is None else {"B": self.b.to_dict()}
        realised = None
        if self.b is not None and self.ratio is not None:
            realised = realised_share(self.ratio, self.a.macs, self.b.macs).to_dict()
        return {
            "schema": SCHEMA,
            "target": self.target,
            "threads": self.threads,
            "batch": self.batch,
            "A": self.a.to_dict(),
            **both,
            "realised": realised,
            "sessions": len(self.sessions),
            "blocks": len(self.sessions[0].blocks),
            "environment": self.sessions[0].fingerprint.before.machine,
            "raw": [session.model_dump(mode="json", by_alias=True) for session in self.sessions],
        }


@dataclass(frozen=True)
class Realised:
    """Speedup beside the ideal one, which is what the saved multiply-accumulates would give at an unchanged rate.

    Attributes:
        ideal: MACs of the dense model over those of the compressed one.
        speedup: measured, as logarithm.
    """

    ideal: float
    speedup: Interval

    @property
    def share(self) -> Interval:
        """ln(speedup / ideal), with the interval of the speedup."""
        gone = math.log(self.ideal)
        return Interval(self.speedup.point - gone, self.speedup.lo - gone, self.speedup.hi - gone)

    def to_dict(self) -> dict[str, Any]:
        """`ideal`, `speedup` and `share` as plain ratios."""
        return {"ideal": self.ideal, "speedup": self.speedup.to_ratio(), "share": self.share.to_ratio()}


def realised_share(ratio: Interval, macs_a: int, macs_b: int) -> Realised:
    """How much of the ideal speedup was realised: speedup / (MACs of A / MACs of B).

    Args:
        ratio: ln(time of B / time of A), for instance of a `Comparison`; its interval is carried over.
        macs_a: multiply-accumulates of the dense model.
        macs_b: of the compressed one.
    """
    return Realised(macs_a / macs_b, Interval(-ratio.point, -ratio.hi, -ratio.lo))


def measure_floor(
    a: Path,
    b: Path | None = None,
    *,
    target: str = "ort-cpu",
    threads: int = 1,
    batch: int = 1,
    input_shape: tuple[int, ...] | None = None,
    sessions: int = 3,
    blocks: int = 10,
    slot_ms: float = 50.0,
    warmup_s: float = 0.5,
    seed: int = 0,
    transport: Transport | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> Floor:
    """The floor of one or two ONNX files on a target, and how close their latency comes.

    Args:
        a: an ONNX file, the dense one where there are two.
        b: the compressed one.
        target: "ort-cpu", "openvino-cpu" or "openvino-cpu-bf16".
        threads: intra-op threads.
        batch: first dimension of the inputs.
        input_shape: shape of one sample; only needed where a file leaves it open.
        sessions: fresh processes.
        blocks: per session; each holds one slot of every model and of every shape of product.
        slot_ms: shortest slot.
        warmup_s: shortest warm-up of each.
        seed: of the order within blocks and the bootstrap.
        transport: where the sessions run; None is this machine.
        on_progress: receives (what was done, share done).

    Raises:
        RecipeError: an option is out of range, or a file has products that are not counted.
        StorageError: a file cannot be read.
        ArtifactError: it is damaged, or cannot be run.
        ParityError: A and B differ in their inputs.
        TargetUnavailable: the target is not there.
        MeasurementError: a session failed, or the machine changed between sessions.
    """
    if PREFIX + target not in OPENERS:
        known = ", ".join(name.removeprefix(PREFIX) for name in OPENERS)
        raise RecipeError(f"target {get_target(target).name!r} has no floor; {known} have one")
    if min(sessions, threads, batch) < 1 or blocks < 4:
        raise RecipeError(
            f"cannot measure {sessions} sessions of {blocks} blocks, {threads} threads, batch {batch}; "
            "at least 1, 4, 1 and 1 are needed"
        )
    get_target(target).probe()
    paths = {"A": a} if b is None else {"A": a, "B": b}
    signatures = {name: read_signature(path, batch, input_shape) for name, path in paths.items()}
    if b is not None and signatures["A"].inputs != signatures["B"].inputs:
        raise ParityError(f"{a} and {b} cannot be measured side by side: their inputs differ")
    graphs = {name: read_graph(path, batch, input_shape) for name, path in paths.items()}
    found = {name: products(graph) for name, graph in graphs.items()}
    for name, path in paths.items():
        if not found[name]:
            raise RecipeError(f"{path} has no matrix product, and so no floor")
    with tempfile.TemporaryDirectory(prefix="slimvit-floor-") as folder:
        variants, names = _variants(Path(folder), target, paths, signatures, graphs, found)
        plan = {
            "schema": PLAN_SCHEMA,
            "seed": seed,
            "blocks": blocks,
            "slot_ms": slot_ms,
            "threads": threads,
            "warmup": {"calls": 10, "seconds": warmup_s},
            "inputs": {
                "count": INPUT_SETS,
                "seed": seed,
                "tensors": [spec.model_dump(mode="json") for spec in signatures["A"].inputs],
            },
            "variants": variants,
        }
        measured = _sessions(plan, sessions, transport or LocalTransport(), on_progress, a)
    limits = [Limit(paths[n].name, found[n], names[n], n, measured, seed) for n in paths]
    return Floor(target, threads, batch, limits[0], limits[1] if b is not None else None, measured, seed)


def _variants(
    folder: Path,
    target: str,
    paths: Mapping[str, Path],
    signatures: Mapping[str, Signature],
    graphs: Mapping[str, Graph],
    found: Mapping[str, tuple[Product, ...]],
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, ...]]]:
    """(variants of a plan: the models, then their products; model → the variants of its products)."""
    variants: list[dict[str, Any]] = [
        {"name": name, "path": str(path.resolve()), "runtime": target, "inputs": list(signatures[name].names)}
        for name, path in paths.items()
    ]
    names: dict[str, tuple[str, ...]] = {}
    for name, graph in graphs.items():
        path = write_products(graph, found[name], folder / f"{name}.onnx")
        variants.append({"name": name + ALONE, "path": str(path), "runtime": PREFIX + target, "inputs": []})
        own = []
        for index, product in enumerate(found[name]):
            path = write_products(graph, [product], folder / f"{name}{index}.onnx")
            own.append(f"{name}{index}: {product}")
            variants.append({"name": own[-1], "path": str(path), "runtime": PREFIX + target, "inputs": []})
        names[name] = tuple(own)
    return variants, names


def _sessions(
    plan: Mapping[str, Any],
    sessions: int,
    transport: Transport,
    on_progress: Callable[[str, float], None] | None,
    a: Path,
) -> tuple[Session, ...]:
    results = []
    for index in range(sessions):

        def report(share: float, text: str, index: int = index) -> None:
            if on_progress is not None:
                on_progress(f"session {index + 1}/{sessions}, {text}", (index + share) / sessions)

        results.append(transport.run({**plan, "session": index}, report))
    try:
        measured = tuple(Session.model_validate_json(json.dumps(result)) for result in results)
    except ValidationError as error:
        raise MeasurementError(f"the floor of {a}: {explain(error)}") from None
    if changes := machine_changes([f for s in measured for f in (s.fingerprint.before, s.fingerprint.after)]):
        raise MeasurementError(f"the machine changed while the floor of {a} was measured: {'; '.join(changes)}")
    return measured
