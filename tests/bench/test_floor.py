"""Arithmetic of floor and realised share on samples from a known truth; then real, short measurements."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from toolchain.bench.floor import ALONE, Floor, Limit, measure_floor, realised_share
from toolchain.bench.intervals import Interval
from toolchain.bench.products import Product
from toolchain.bench.protocol import Session
from toolchain.errors import ArtifactError, MeasurementError, ParityError, RecipeError
from toolchain.targets.device_runner import SESSION_SCHEMA

SHORT = {"sessions": 1, "blocks": 4, "slot_ms": 2.0, "warmup_s": 0.01}


def session(times_ms, index=0, blocks=30, noise=0.01, drift=0.0, seed=0):
    """Samples of variants whose true times are given; `drift` slows all of them down alike, block by block."""
    rng = np.random.default_rng([seed, index])
    names = list(times_ms)
    facts = {"outputs": [], "warmup_calls": 1, "warmup_seconds": 0.1, "call_ns": 1.0, "calls_per_slot": 5}
    fingerprint = {"machine": {"cpu": "test", "threads": 1, "affinity": [0]}, "state": {}}
    rows = []
    for block in range(blocks):
        slow = math.exp(drift * block)
        samples = {
            name: [round(1e6 * ms * slow * math.exp(noise * rng.standard_normal())) for _ in range(4)]
            for name, ms in times_ms.items()
        }
        rows.append({"order": names, "samples_ns": samples})
    raw = {
        "schema": SESSION_SCHEMA,
        "session": index,
        "fingerprint": {"before": fingerprint, "after": fingerprint},
        "variants": {name: {**facts, "discarded": 1} for name in names},
        "blocks": rows,
    }
    return Session.model_validate_json(json.dumps(raw))


def product(macs, count=1):
    return Product("Gemm", ((1, macs), (macs, 1)), "float", macs, tuple(f"y{i}" for i in range(count)))


TIMES = {"A": 10.0, "B": 5.5, "A alone": 9.0, "B alone": 4.0, "A0": 6.0, "A1": 4.0, "B0": 4.1}


def made_up(**options):
    sessions = tuple(session(TIMES, index, **options) for index in range(3))
    a = Limit("a.onnx", (product(600_000, 2), product(800_000)), ("A0", "A1"), "A", sessions)
    b = Limit("b.onnx", (product(1_000_000),), ("B0",), "B", sessions)
    return Floor("ort-cpu", 1, 1, a, b, sessions)


@pytest.mark.parametrize("drift", [0.0, 0.03])
def test_the_share_is_that_of_the_truth_whatever_the_machine_does_meanwhile(drift):
    found = made_up(drift=drift)
    share = found.a.share.to_ratio()
    assert share["lo"] <= 0.9 <= share["hi"]
    assert share["hi"] - share["lo"] < 0.02
    assert found.b.share.to_ratio()["point"] == pytest.approx(4 / 5.5, rel=0.01)
    if not drift:
        assert found.a.floor_ms == pytest.approx(9.0, rel=0.01)
        assert found.a.latency_ms == pytest.approx(10.0, rel=0.01)
        assert found.a.product_ms == pytest.approx([6.0, 4.0], rel=0.01)
    assert found.a.macs == 2_000_000


def test_the_record_says_what_was_measured():
    record = json.loads(json.dumps(made_up().to_dict(), allow_nan=False))
    assert record["A"]["gmacs_per_s"] == pytest.approx(2e6 / 9e-3 / 1e9, rel=0.01)
    assert [row["count"] for row in record["A"]["products"]] == [2, 1]
    assert record["realised"]["ideal"] == 2.0
    assert record["realised"]["share"]["point"] == pytest.approx((10 / 5.5) / 2, rel=0.01)
    assert len(record["raw"]) == record["sessions"] == 3
    again = tuple(Session.model_validate_json(json.dumps(raw)) for raw in record["raw"])
    assert again == made_up().sessions, "the raw samples are all there"


def test_realised_share_is_the_speedup_over_the_ideal_and_carries_its_interval():
    ratio = Interval(math.log(0.5), math.log(0.48), math.log(0.55))  # time of B over time of A
    found = realised_share(ratio, macs_a=400, macs_b=160).to_dict()
    assert found["ideal"] == 2.5
    assert found["speedup"] == pytest.approx({"point": 2.0, "lo": 1 / 0.55, "hi": 1 / 0.48})
    assert found["share"] == pytest.approx({"point": 0.8, "lo": 1 / 0.55 / 2.5, "hi": 1 / 0.48 / 2.5})
    assert realised_share(Interval(0, 0, 0), 10, 10).to_dict()["share"]["point"] == 1.0


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_a_model_of_products_alone_is_at_its_floor(stack, tmp_path, target):
    """Nothing but matmuls, large enough that a call of the runtime is nothing beside them."""
    if target != "ort-cpu":
        pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    a = stack(tmp_path / "a.onnx", width=512, layers=8)
    b = stack(tmp_path / "b.onnx", width=512, layers=2)
    found = measure_floor(a, b, target=target, batch=32, **{**SHORT, "slot_ms": 10.0, "blocks": 8})
    assert (found.a.macs, found.b.macs) == (8 * 32 * 512**2, 2 * 32 * 512**2)
    assert [str(p) for p in found.a.products] == ["MatMul 32×512 · 512×512"]
    assert 0.5 < found.a.share.to_ratio()["point"] < 1.5  # a busy machine; 1 on an idle one
    record = found.to_dict()
    assert record["realised"]["ideal"] == 4.0
    assert 0.4 < record["realised"]["share"]["point"] < 2.0
    assert set(found.sessions[0].variants) >= {"A", "B", "A" + ALONE, "B" + ALONE}
    assert record["environment"]["threads"] == 1


def test_work_that_is_no_product_shows_as_distance_from_the_floor(tmp_path):
    """The planted fault: the same matmuls with a long tail of element-wise work between them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, last = [], [], "image"
    for layer in range(4):
        weights.append(numpy_helper.from_array(np.eye(256, dtype=np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]))
        last = f"m{layer}"
        for step in range(6):
            nodes.append(helper.make_node("Erf" if step % 2 else "Sin", [last], [f"e{layer}.{step}"]))
            last = f"e{layer}.{step}"
    nodes[-1].output[0] = "logits"
    io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 256]) for name in ("image", "logits")]
    graph = helper.make_graph(nodes, "g", io[:1], io[1:], weights)
    path = tmp_path / "slow.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    found = measure_floor(path, batch=32, **SHORT)
    assert found.b is None
    assert found.to_dict()["realised"] is None
    assert found.a.share.to_ratio()["hi"] < 0.8


def test_what_has_no_floor_is_refused(stack, tmp_path):
    a = stack(tmp_path / "a.onnx")
    with pytest.raises(RecipeError, match=r"'eager' has no floor; ort-cpu, openvino-cpu"):
        measure_floor(a, target="eager")
    with pytest.raises(RecipeError, match="did you mean 'ort-cpu'"):
        measure_floor(a, target="ort-cpus")
    with pytest.raises(RecipeError, match="at least 1, 4, 1 and 1"):
        measure_floor(a, blocks=2)
    with pytest.raises(ParityError, match="inputs differ"):
        measure_floor(a, stack(tmp_path / "narrow.onnx", width=64), **SHORT)
    (tmp_path / "bad.onnx").write_bytes(a.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"bad\.onnx"):
        measure_floor(tmp_path / "bad.onnx", **SHORT)


def test_sessions_of_two_machines_give_no_floor(stack, tmp_path):
    from toolchain.bench.transport import LocalTransport

    class Moving:
        def run(self, plan, on_progress):
            result = LocalTransport().run(plan, on_progress)
            result["fingerprint"]["after"]["machine"]["governor"] = "another"
            return result

    with pytest.raises(MeasurementError, match="governor"):
        measure_floor(stack(tmp_path / "a.onnx"), transport=Moving(), **SHORT)
