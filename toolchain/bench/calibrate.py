"""How small a difference this machine can support now, and how long that takes: one artifact against itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import Field

from toolchain.bench import stored
from toolchain.bench.samples import ArtifactFacts, Scenario, Strict
from toolchain.bench.single import Measurement, measure
from toolchain.bench.transport import Transport

SCHEMA = "slimvit.bench.calibration/2"
BLOCKS = (10, 20, 40, 80)
"""Blocks a session that are told apart; 20 and its doublings are what a comparison takes."""
WIDTH, LAYERS, TOKENS = 384, 8, 197
"""The built-in artifact: the two feed-forward matmuls of a DeiT-S block, four times."""


@dataclass(frozen=True)
class Row:
    """What so many blocks a session support, and about how many seconds a comparison with them takes."""

    blocks: int
    tau_min: float
    seconds: float


class Calibration(Strict):
    """A measurement and the seconds that it took in all; the rows follow from both."""

    measurement: Measurement
    seconds: Annotated[float, Field(gt=0)]

    @property
    def rows(self) -> tuple[Row, ...]:
        """One for each number of blocks that a comparison may take a session, up to those that were measured.

        The seconds of a row are those of its slots and warm-ups, with the third slot that a comparison has, and what
        starting the processes took.
        """
        found, blocks = self.measurement, self.measurement.design.blocks
        around = max(0.0, self.seconds - found.timed_seconds(blocks, slots=2))
        counts = sorted({count for count in BLOCKS if count < blocks} | {blocks})
        return tuple(Row(count, found.tau_min(count), found.timed_seconds(count, slots=3) + around) for count in counts)

    @property
    def scenario(self) -> Scenario:
        """What was timed."""
        return self.measurement.scenario

    @property
    def artifacts(self) -> dict[Literal["A"], ArtifactFacts]:
        """Which bytes were timed."""
        return self.measurement.artifacts

    @property
    def environment(self) -> dict[str, Any]:
        """The machine, the same before and after all sessions."""
        return self.measurement.environment

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `bench calibrate --json`: the rows and, under `raw`, what they follow from."""
        found = self.measurement.to_dict()
        return {
            "schema": SCHEMA,
            "artifact": found["artifact"],
            "latency_ms": found["latency_ms"],
            "rows": [asdict(row) for row in self.rows],
            "environment": found["environment"],
            "raw": self.model_dump(mode="json", by_alias=True),
        }

    @staticmethod
    def load(path: Path) -> Calibration:
        """The calibration in a file; raises as `stored.load`."""
        return stored.load(path, SCHEMA, Calibration.model_validate_json)


def calibrate(
    artifact: Path,
    *,
    target: str,
    threads: int = 1,
    batch: int = 1,
    input_shape: tuple[int, ...] | None = None,
    affinity: tuple[int, ...] | None = None,
    blocks: int = BLOCKS[-1],
    transport: Transport | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> Calibration:
    """What an artifact, timed against itself in three sessions, says of the machine; arguments and errors as `measure`.

    Fewer blocks are the first of each session, so one measurement gives all rows.
    """
    begun = time.monotonic()
    found = measure(
        artifact,
        target=target,
        threads=threads,
        batch=batch,
        input_shape=input_shape,
        affinity=affinity,
        blocks=blocks,
        cold_starts=0,
        transport=transport,
        on_progress=on_progress,
    )
    return Calibration(measurement=found, seconds=time.monotonic() - begun)


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
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
