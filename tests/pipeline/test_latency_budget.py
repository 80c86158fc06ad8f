"""Latency tables and checks: what is timed, how it becomes a table, and when it is timed again."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import onnx
import pytest
from builders import TINY, choices_of, dense_model

from toolchain.cost import Widths, trace
from toolchain.export.onnx_graph import linear_shapes
from toolchain.files import exclusive
from toolchain.on_device.runner import block_orders, plan_digest
from toolchain.pipeline import latency_budget as latency
from toolchain.pipeline.latency_budget import (
    Clock,
    Setting,
    Timing,
    latency_of,
    time_widths,
    unit_classes,
    variant_of,
)
from toolchain.recipe import CompressSection

pytestmark = pytest.mark.clock

SPLIT = CompressSection(method="hybrid")
MULTIPLES = {"head_dim": 4, "mlp_hidden": 4, "rank": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return dense_model(**TINY)


class Device:
    """A transport whose variants take as long as their linears have weights; records every plan that it is sent."""

    def __init__(self):
        self.plans, self.shapes = [], []

    def run(self, plan, on_progress):
        self.plans.append(plan)
        names = [variant["name"] for variant in plan["variants"]]
        rng, times = np.random.default_rng(plan["session"]), {}
        for variant in plan["variants"]:
            found = linear_shapes(onnx.load(variant["path"]))
            times[variant["name"]] = 100 * sum(rows * columns * count for (rows, columns), count in found.items())
            self.shapes.append(found)
        drift = np.exp(0.3 * rng.standard_normal(plan["blocks"]))  # of the machine, shared by a block
        blocks = [
            {"order": order, "samples_ns": {name: [round(times[name] * drift[index])] * 4 for name in names}}
            for index, order in enumerate(block_orders(names, plan["blocks"], plan["seed"], plan["session"]))
        ]
        machine = {"machine": {"cpu": "made up"}, "state": {}}
        facts = {name: {"call_ns": times[name]} for name in names}
        fingerprint = {"before": machine, "after": machine}
        return {"variants": facts, "blocks": blocks, "fingerprint": fingerprint, "plan_sha256": plan_digest(plan)}


@pytest.mark.parametrize(
    "widths",
    [
        Widths(),
        Widths({("blocks.0.attn", "head_dim"): 8, ("blocks.1.mlp", "mlp_hidden"): 12}),
        Widths({("blocks.0.mlp", "mlp_hidden"): 1}, {"blocks.0.attn.qkv": 5, "blocks.1.attn.proj": 40}),
    ],
    ids=["dense", "units", "ranks"],
)
def test_a_variant_has_the_shape_that_its_widths_predict(model, widths):
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    found = variant_of(model, widths)
    shape = trace(found.module, found.family, found.preprocess.input_size)
    wanted = trace(model.module, model.family, model.preprocess.input_size).shrunk(widths, model.groups)
    assert (shape.params, shape.macs) == (wanted.params, wanted.macs)
    assert all(tensor.equal(before[name]) for name, tensor in model.module.state_dict().items())


def test_equal_units_are_one_class(model):
    joint = unit_classes(model, choices_of(model, None, MULTIPLES))
    assert [(len(members), widths, whole) for members, widths, whole in joint] == [
        (2, (4, 8, 12), 16),
        (2, (4, 48, 96, 144), 192),
    ]
    split = unit_classes(model, choices_of(model, SPLIT, MULTIPLES))
    assert {members[0]: whole for members, _, whole in split} == {
        ("blocks.0.mlp", "mlp_hidden"): 192,
        ("blocks.0.attn.qkv", "rank"): 36,
        ("blocks.0.attn.proj", "rank"): 24,
    }
    assert all(max(widths) < whole and len(members) == 2 for members, widths, whole in split)


def test_ratios_are_paired_within_blocks(model):
    """The machine drifts by 30 % from block to block; the ratio does not."""
    device = Device()
    narrow = [Widths({("blocks.0.mlp", "mlp_hidden"): 4}), Widths({("blocks.0.mlp", "mlp_hidden"): 96})]
    found = time_widths(model, narrow, Setting("ort-cpu", batch=3, threads=2), sessions=2, transport=device)
    weights = [sum(i * o * n for (i, o), n in shapes.items()) for shapes in device.shapes[1:4]]
    assert found.ratios == pytest.approx([weights[1] / weights[0], weights[2] / weights[0]], rel=1e-6)
    assert len(device.plans) == 3, "the dense model alone, then the sessions"
    alone, *sessions = device.plans
    assert [v["name"] for v in alone["variants"]] == ["dense"]
    for plan in sessions:
        assert [v["name"] for v in plan["variants"]] == ["dense", "variant0", "variant1"]
        assert plan["blocks"] == latency.BLOCKS[1]
        assert plan["threads"] == 2
        assert plan["inputs"]["tensors"] == [{"shape": [3, 3, 32, 32], "dtype": "float32"}]
    assert [plan["session"] for plan in sessions] == [0, 1]


def fake_timer(calls, *, noise=0.0):
    """Latency in proportion to MACs; with noise a wider unit may seem faster."""

    def timed(dense, variants, setting, *, sessions=1, told=lambda *_: None, transport=None):
        calls.append(list(variants))
        shape = trace(dense.module, dense.family, dense.preprocess.input_size)
        ratios = [
            shape.shrunk(v, dense.groups).macs / shape.macs * (1 + noise * (-1) ** i) for i, v in enumerate(variants)
        ]
        return Timing(2.0, tuple(ratios), {"cpu": "made up"})

    return timed


def test_a_table_predicts_what_was_measured(model, monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "time_widths", fake_timer(calls))
    choices = choices_of(model, SPLIT, MULTIPLES)
    table = Clock(model, choices, Setting("ort-cpu", 2, 1)).table()
    assert (table.target, table.batch, table.threads, table.dense_ms) == ("ort-cpu", 2, 1, 2.0)
    assert table.environment == {"cpu": "made up"}
    shape = trace(model.module, model.family, model.preprocess.input_size)
    for variant in [v for variants in calls for v in variants]:
        wanted = shape.shrunk(variant, model.groups).macs / shape.macs
        assert table.ratio(variant) == pytest.approx(wanted)
    one = Widths({("blocks.1.mlp", "mlp_hidden"): 96})
    assert table.ratio(one) == pytest.approx(shape.shrunk(one, model.groups).macs / shape.macs), (
        "one of two equal units"
    )


def test_noise_never_makes_a_wider_unit_faster(model, monkeypatch):
    monkeypatch.setattr(latency, "time_widths", fake_timer([], noise=0.3))
    table = Clock(model, choices_of(model, None, MULTIPLES), Setting("ort-cpu")).table()
    for curve in table.saved:
        shares = [share for _, share in curve.points]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0.0


def test_what_was_measured_is_kept_until_something_changes(model, monkeypatch, cache):
    calls = []
    monkeypatch.setattr(latency, "time_widths", fake_timer(calls))
    choices, widths = choices_of(model, None, MULTIPLES), Widths({("blocks.0.mlp", "mlp_hidden"): 8})
    clock = Clock(model, choices, Setting("ort-cpu"))

    def asked(clock):
        before = len(calls)
        clock.table()
        clock.ratio(widths)
        return len(calls) - before

    assert asked(clock) == 3, "two classes and a check"
    assert asked(clock) == 0
    assert asked(Clock(dense_model(**TINY, seed=1), choices, Setting("ort-cpu"))) == 0, "weights do not matter"
    for changed in (
        replace(clock, setting=Setting("ort-cpu", batch=2)),
        replace(clock, setting=Setting("ort-cpu", threads=2)),
        replace(clock, setting=Setting("ort-cpu", simplify=False)),
        replace(clock, setting=Setting("eager")),
        replace(clock, choices=choices_of(model, None, {"mlp_hidden": 16})),
    ):
        assert asked(changed) == 3
    monkeypatch.setattr(latency, "conditions", lambda *_: ["another machine"])
    assert asked(clock) == 3
    clock.forget()
    assert asked(clock) == 3, "asked to measure anew"
    for file in clock.folder().glob("*.json"):
        file.write_text("{")
    assert asked(clock) == 3, "a damaged record is no record"
    assert json.loads((clock.folder() / "table.json").read_text())["target"] == "ort-cpu"


def test_nothing_is_forgotten_under_the_feet_of_another_process(model, monkeypatch, cache):
    """The lock stays where others wait for it, and what is measured under it stays until it is released."""
    monkeypatch.setattr(latency, "time_widths", fake_timer([]))
    clock = Clock(model, choices_of(model, None, MULTIPLES), Setting("ort-cpu"))
    clock.table()
    table = clock.folder() / "table.json"
    locks = sorted(clock.folder().parent.glob(".*.lock"))
    assert locks
    with exclusive(clock.folder()):
        other = threading.Thread(target=clock.forget, daemon=True)
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert table.is_file()
    other.join(10)
    assert not other.is_alive()
    assert not table.exists()
    assert sorted(clock.folder().parent.glob(".*.lock")) == locks
    clock.forget()  # nothing left to forget


def test_latency_of_clocks_checks_every_target(model, monkeypatch):
    monkeypatch.setattr(latency, "time_widths", fake_timer([]))
    choices = choices_of(model)
    found = latency_of([Clock(model, choices, Setting(target)) for target in ("ort-cpu", "eager")])
    assert [table.target for table in found.tables] == ["ort-cpu", "eager"]
    assert found.check(Widths()) == {"ort-cpu": 1.0, "eager": 1.0}
    assert latency_of([]).check is None


@pytest.mark.parametrize("target", ["ort-cpu", "eager"])
def test_a_real_measurement(target, monkeypatch):
    """Files are written and timed in fresh processes. Nothing is asserted of time but that it is there."""
    monkeypatch.setattr(latency, "BLOCKS", (4, 4))
    monkeypatch.setattr(latency, "SLOT_MS", 2.0)
    monkeypatch.setattr(latency, "WARM_UP_S", 0.01)
    model = dense_model(**{**TINY, "depth": 1})
    told = []
    narrow = Widths({("blocks.0.mlp", "mlp_hidden"): 4, ("blocks.0.attn", "head_dim"): 4})
    found = time_widths(model, [narrow], Setting(target), told=lambda share, text: told.append((share, text)))
    assert found.dense_ms > 0
    assert 0 < found.ratios[0] < 10
    assert found.environment["threads"] == 1
    assert [share for share, _ in told] == sorted(share for share, _ in told)
