"""Arithmetic of floor and realised share on samples from a known truth; then real, short measurements."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from builders import few_sessions
from measuring import device_of

from toolchain.analysis.floor import measure_floor
from toolchain.analysis.products import Product
from toolchain.analysis.realised import (
    SCHEMA,
    Counted,
    Floor,
    alone,
    product_variants,
    realised_share,
    variants_of,
)
from toolchain.errors import ArtifactError, MeasurementError, ParityError, RecipeError, TargetUnavailable
from toolchain.measure.intervals import Interval
from toolchain.measure.samples import ArtifactFacts, Design, InputSpec, Scenario, Session, Workload
from toolchain.measure.verify import verify
from toolchain.on_device.runner import SESSION_SCHEMA, block_orders

pytestmark = pytest.mark.clock

SHORT = Design(sessions=1, blocks=4, slot_ms=2.0, warmup_s=0.01)


def session(times_ms, index=0, blocks=30, noise=0.01, drift=0.0, seed=0):
    """Samples of variants whose true times are given; `drift` slows all of them down alike, block by block."""
    rng = np.random.default_rng([seed, index])
    names = list(times_ms)
    facts = {"outputs": [], "warmup_calls": 1, "warmup_seconds": 0.1, "call_ns": 1.0, "calls_per_slot": 5}
    fingerprint = {"machine": {"cpu": "test", "threads": 1, "affinity": [0]}, "state": {}}
    rows = []
    for block, order in enumerate(block_orders(names, blocks, 0, index)):
        slow = math.exp(drift * block)
        samples = {
            name: [round(1e6 * ms * slow * math.exp(noise * rng.standard_normal())) for _ in range(4)]
            for name, ms in times_ms.items()
        }
        rows.append({"order": order, "samples_ns": samples})
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


def counted(name, *products):
    return Counted(artifact=ArtifactFacts(name=name, size_bytes=1, sha256=name), products=products)


MODELS = {"A": counted("a.onnx", product(600_000, 2), product(800_000)), "B": counted("b.onnx", product(1_000_000))}
# In the order of `variants_of`: A, B, A', A alone, the two shapes of A, B alone, its one shape.
TIMES_MS = (10.0, 5.5, 10.0, 9.0, 6.0, 4.0, 4.0, 4.1)


def made_up(control=1.0, **options):
    times = dict(zip(variants_of(MODELS), TIMES_MS, strict=True))
    times["A'"] *= control
    sessions = tuple(session(times, index, **options) for index in range(3))
    scenario = Scenario(target="ort-cpu", threads=1, batch=1, inputs=(InputSpec(shape=(1, 8), dtype="float32"),))
    return Floor(scenario=scenario, design=few_sessions(blocks=30), models=MODELS, sessions=sessions)


@pytest.mark.parametrize("drift", [0.0, 0.03])
def test_the_share_is_that_of_the_truth_whatever_the_machine_does_meanwhile(drift):
    found = made_up(drift=drift)
    a, b = found.limits
    share = a.share.to_ratio()
    assert share["lo"] <= 0.9 <= share["hi"]
    assert share["hi"] - share["lo"] < 0.02
    assert b.share.to_ratio()["point"] == pytest.approx(4 / 5.5, rel=0.01)
    if not drift:
        assert a.floor_ms == pytest.approx(9.0, rel=0.01)
        assert a.latency_ms == pytest.approx(10.0, rel=0.01)
        assert [rate.ms for rate in a.rates] == pytest.approx([6.0, 4.0], rel=0.01)
    assert a.macs == 2_000_000


def test_the_record_says_what_was_measured():
    record = json.loads(json.dumps(made_up().to_dict(), allow_nan=False))
    assert record["A"]["gmacs_per_s"] == pytest.approx(2e6 / 9e-3 / 1e9, rel=0.01)
    assert [row["count"] for row in record["A"]["products"]] == [2, 1]
    assert record["realised"]["ideal"] == 2.0
    assert record["realised"]["share"]["point"] == pytest.approx((10 / 5.5) / 2, rel=0.01)
    assert record["sessions"] == 3
    assert Floor.model_validate_json(json.dumps(record["raw"])) == made_up(), "the raw samples are all there"


def test_a_control_that_strays_verifies_nothing():
    assert made_up().is_valid
    assert not made_up(control=1.04).is_valid
    assert made_up(control=1.04).to_dict()["tau_min"] > 0.1


@pytest.mark.parametrize("edit", ["share", "speedup", "macs", "samples"])
def test_a_stored_floor_is_recomputed_and_an_edited_one_refused(tmp_path, edit):
    record, path = made_up().to_dict(), tmp_path / "floor.json"
    path.write_text(json.dumps(record))
    assert verify(path) == made_up()
    assert record["schema"] == SCHEMA
    if edit == "share":
        record["A"]["share_of_floor"]["point"] = 0.99
    elif edit == "speedup":
        record["realised"]["speedup"]["point"] = 2.0
    elif edit == "macs":
        record["raw"]["models"]["B"]["products"][0]["macs"] //= 2
    else:
        block = record["raw"]["sessions"][0]["blocks"][0]["samples_ns"]
        block["A alone"] = block["A alone"][1:]
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError):
        verify(path)


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
    for _ in range(4):  # whoever else uses the machine may take a whole measurement
        found = measure_floor(a, b, target, Workload(batch=32), SHORT.model_copy(update={"slot_ms": 10.0, "blocks": 8}))
        share, realised = found.limit("A").share.to_ratio()["point"], found.to_dict()["realised"]["share"]["point"]
        if 0.5 < share < 1.5 and 0.4 < realised < 2.0:
            break
    a, b = found.limits
    assert (a.macs, b.macs) == (8 * 32 * 512**2, 2 * 32 * 512**2)
    assert [str(p) for p in a.counted.products] == ["MatMul 32×512 · 512×512"]
    assert 0.5 < share < 1.5  # a busy machine; 1 on an idle one
    record = found.to_dict()
    assert record["realised"]["ideal"] == 4.0
    assert 0.4 < realised < 2.0
    assert set(found.sessions[0].variants) >= {
        "A",
        "B",
        "A'",
        alone("A"),
        alone("B"),
        *product_variants("A", a.counted.products),
    }
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
    found = measure_floor(path, workload=Workload(batch=32), design=SHORT)
    (limit,) = found.limits
    assert found.to_dict()["realised"] is None
    assert limit.share.to_ratio()["hi"] < 0.8


def test_what_has_no_floor_is_refused(stack, tmp_path):
    a = stack(tmp_path / "a.onnx")
    with pytest.raises(TargetUnavailable, match=r"'eager' .*it has no floor; .* --target: ort-cpu, openvino-cpu"):
        measure_floor(a, target="eager")
    with pytest.raises(RecipeError, match="did you mean 'ort-cpu'"):
        measure_floor(a, target="ort-cpus")
    with pytest.raises(ParityError, match="inputs differ"):
        measure_floor(a, stack(tmp_path / "narrow.onnx", width=64), design=SHORT)
    (tmp_path / "bad.onnx").write_bytes(a.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"bad\.onnx"):
        measure_floor(tmp_path / "bad.onnx", design=SHORT)


def test_sessions_of_two_machines_give_no_floor(stack, tmp_path):
    from toolchain.devices.transport import LocalTransport

    class Moving:
        def run(self, schedule, progress):
            result = LocalTransport().run(schedule, progress)
            result["fingerprint"]["after"]["machine"]["governor"] = "another"
            return result

    with pytest.raises(MeasurementError, match="governor"):
        measure_floor(stack(tmp_path / "a.onnx"), target=device_of(Moving()), design=SHORT)
