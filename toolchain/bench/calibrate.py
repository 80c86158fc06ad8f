"""How small a difference this machine can support now, and how long that takes: one artifact against itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from toolchain.bench.single import Measurement, measure

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


@dataclass(frozen=True)
class Calibration:
    """The measurement, what it took in all, and one row for each number of blocks."""

    measurement: Measurement
    seconds: float
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `bench calibrate --json`; `raw` is that of `bench run`."""
        found = self.measurement.to_dict()
        return {
            "schema": "slimvit.bench.calibration/1",
            "artifact": found["artifact"],
            "latency_ms": found["latency_ms"],
            "rows": [asdict(row) for row in self.rows],
            "seconds": self.seconds,
            "environment": found["environment"],
            "raw": found["raw"],
        }


def calibrate(
    artifact: Path,
    *,
    target: str,
    threads: int = 1,
    batch: int = 1,
    input_shape: tuple[int, ...] | None = None,
    affinity: tuple[int, ...] | None = None,
    blocks: int = BLOCKS[-1],
    on_progress: Callable[[str, float], None] | None = None,
) -> Calibration:
    """What an artifact, timed against itself in three sessions, says of the machine; arguments and errors as `measure`.

    Fewer blocks are the first of each session, so one measurement gives all rows. The seconds of a row are those of its
    slots and warm-ups, with the third slot that a comparison has, and what starting the processes took.
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
        on_progress=on_progress,
    )
    spent = time.monotonic() - begun
    around = max(0.0, spent - found.timed_seconds(blocks, slots=2))
    counts = sorted({count for count in BLOCKS if count < blocks} | {blocks})
    rows = tuple(Row(count, found.tau_min(count), found.timed_seconds(count, slots=3) + around) for count in counts)
    return Calibration(found, spent, rows)


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
