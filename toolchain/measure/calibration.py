"""Compares one artifact with itself, to find the smallest difference that this machine can verify, and the time it takes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import JsonValue, model_validator

from toolchain.devices.device import Device, device_for
from toolchain.measure import stored
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import A, ArtifactFacts, Design, Scenario, Workload
from toolchain.progress import SILENT, Progress
from toolchain.records import Record

SCHEMA = "slimvit.bench.calibration/3"
WIDTH, LAYERS, TOKENS = 384, 8, 197
"""The built-in artifact: the two feed-forward matmuls of a DeiT-S block, four times."""


@dataclass(frozen=True)
class Row:
    """One look of a comparison: the data that it has, the smallest τ that this supports, and the seconds until then."""

    look: int
    sessions: int
    blocks: int
    tau_min: float
    seconds: float


class Calibration(Record):
    """A comparison of an artifact with itself that took all its looks, and the seconds that had gone by at each."""

    name: ClassVar[str] = SCHEMA

    comparison: Comparison
    seconds: tuple[float, ...]

    @model_validator(mode="after")
    def _took_all_its_looks(self) -> Calibration:
        comparison, seconds = self.comparison, self.seconds
        if comparison.artifacts["A"] != comparison.artifacts["B"]:
            raise ValueError("a calibration compares an artifact with itself")
        comparison.require_looks(_always)
        if len(seconds) != comparison.looks or list(seconds) != sorted(seconds) or seconds[0] <= 0:
            raise ValueError(f"expected ascending seconds of {comparison.looks} looks, got {list(seconds)}")
        return self

    @property
    def rows(self) -> tuple[Row, ...]:
        """One row for each look, derived from the control, A' against A."""
        looks = [self.comparison.at_look(look) for look in range(1, self.comparison.looks + 1)]
        return tuple(
            Row(at.looks, len(at.sessions), at.blocks, at.tau_min, seconds)
            for at, seconds in zip(looks, self.seconds, strict=True)
        )

    @property
    def scenario(self) -> Scenario:
        return self.comparison.scenario

    @property
    def artifacts(self) -> dict[Literal["A"], ArtifactFacts]:
        return {A: self.comparison.artifacts["A"]}

    @property
    def headline(self) -> str:
        last = self.rows[-1]
        return f"τ ≥ {100 * last.tau_min:.1f} % with {last.blocks} blocks"

    @property
    def environment(self) -> dict[str, JsonValue]:
        return self.comparison.environment

    def to_dict(self) -> dict[str, object]:
        """The JSON object of `bench calibrate --json`: the rows and, under `raw`, what they follow from."""
        return {
            "schema": SCHEMA,
            "artifact": self.comparison.artifacts["A"].name,
            "latency_ms": self.comparison.latency_ms(A),
            "rows": [asdict(row) for row in self.rows],
            "environment": self.environment,
            **stored.sealed(self.model_dump(mode="json", by_alias=True)),
        }

    @staticmethod
    def load(path: Path) -> Calibration:
        """The calibration in a file; raises as `stored.load`."""
        return stored.load(path, SCHEMA, Calibration.model_validate_json)


def _always(comparison: Comparison) -> bool:  # noqa: ARG001 - whatever it says
    """Always True: a calibration takes every look."""
    return True


def calibrate(
    artifact: Path,
    target: str | Device = "ort-cpu",
    workload: Workload = Workload(),
    design: Design = Design(),
    progress: Progress = SILENT,
) -> Calibration:
    """Compares an artifact with itself through all looks; arguments and errors as `compare`.

    Sessions of an earlier run are not taken up: how long it takes is part of the answer.
    """
    begun, seconds = time.monotonic(), list[float]()

    def go_on(comparison: Comparison) -> bool:
        seconds.append(time.monotonic() - begun)
        return _always(comparison)

    device = device_for(target).afresh
    comparison = compare(artifact, artifact, device, workload, design, undecided=go_on, progress=progress)
    return Calibration(comparison=comparison, seconds=(*seconds, time.monotonic() - begun))


def built_in(path: Path) -> Path:
    """Writes the artifact that is timed where the user names none: matmuls of a ViT's shapes, seeded."""
    rng, shapes = np.random.default_rng(0), [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)] * (LAYERS // 2)
    names = ["tokens", *(f"hidden{index}" for index in range(LAYERS - 1)), "out"]
    weights = [(rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32) for shape in shapes]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], f"weight{i}"], [names[i + 1]]) for i in range(LAYERS)],
        "calibration",
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])],
        [numpy_helper.from_array(weight, f"weight{index}") for index, weight in enumerate(weights)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path
