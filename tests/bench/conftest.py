"""Small ONNX models, and comparisons whose samples are made up from a known truth."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from toolchain.bench.protocol import Comparison
from toolchain.bench.samples import VARIANTS, Design, Scenario
from toolchain.targets.device_runner import SESSION_SCHEMA, block_orders


def write_stack(
    path: Path, *, width: int = 96, layers: int = 4, batch: int | str = "batch", scale: float = 1.0
) -> Path:
    """An ONNX file of `layers` square matmuls: its time grows with their number and nothing else."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((width, width)).astype(np.float32) * scale / width**0.5 for _ in range(layers)]
    names = ["image", *(f"hidden{i}" for i in range(layers - 1)), "logits"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], f"weight{i}"], [names[i + 1]]) for i in range(layers)],
        "stack",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, width])],
        [numpy_helper.from_array(weight, f"weight{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Sessions of an interrupted test are no business of the next."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def stack() -> Callable[..., Path]:
    return write_stack


def write_samples(
    *,
    b: float = 0.0,
    control: float = 0.0,
    noise: float = 0.002,
    session_shift: float = 0.0,
    design: Design | None = None,
    looks: int = 1,
    seed: int = 1,
) -> Comparison:
    """A comparison of `looks` looks whose true ln(B/A) is `b`, plus `session_shift` times the session's number."""
    design = design or Design()
    rng = np.random.default_rng(seed)
    machine = {"cpu": "test", "threads": 1, "affinity": [0], "runtimes": {"onnxruntime": "1"}}
    fingerprint = {"machine": machine, "state": {}}
    facts = {"outputs": [[1, 8]], "warmup_calls": 10, "warmup_seconds": 1.0, "call_ns": 1e6}
    sessions = []
    for session in range(design.sessions * looks):
        truth = {"A": 0.0, "B": b + session * session_shift, "A'": control}
        blocks = [
            {
                "order": order,
                "samples_ns": {
                    name: [round(1e7 * np.exp(truth[name] + noise * rng.standard_normal())) for _ in range(4)]
                    for name in order
                },
            }
            for order in block_orders(VARIANTS, design.blocks_of(session), design.seed, session)
        ]
        sessions.append(
            {
                "schema": SESSION_SCHEMA,
                "session": session,
                "fingerprint": {"before": fingerprint, "after": fingerprint},
                "variants": {name: {**facts, "calls_per_slot": 5, "discarded": 1} for name in VARIANTS},
                "blocks": blocks,
            }
        )
    raw = {
        "scenario": Scenario(target="ort-cpu", threads=1, batch=1, inputs=()).model_dump(mode="json"),
        "design": design.model_dump(mode="json"),
        "parity": "pass",
        "artifacts": {name: {"name": f"{name}.onnx", "size_bytes": 1, "sha256": "0"} for name in "AB"},
        "sessions": sessions,
    }
    return Comparison.model_validate_json(json.dumps(raw))


@pytest.fixture
def made_up() -> Callable[..., Comparison]:
    return write_samples
