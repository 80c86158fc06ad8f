"""Latency tables and checks: what is timed, how it becomes a table, and when it is timed again."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace

import onnx
import pytest
from builders import TINY, choices_of, dense_model
from measuring import Scripted, Updated, device_of, progress_to
from sweeps import swept

from toolchain.cost import Widths, trace
from toolchain.devices.device import device_for
from toolchain.export.onnx_graph import linear_shapes
from toolchain.files import exclusive
from toolchain.measure.samples import Design, Workload
from toolchain.pipeline.latency_budget import (
    DESIGN,
    Clock,
    Setting,
    Timing,
    latency_of,
    time_widths,
    unit_classes,
    variant_of,
)
from toolchain.recipe import CompressSection
from toolchain.targets import TARGETS

SPLIT = CompressSection(method="hybrid")
HERE = Setting(device_for("ort-cpu"))
MULTIPLES = {"head_dim": 4, "mlp_hidden": 4, "rank": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return dense_model(**TINY)


class Proportional(Scripted):
    """Variants take as long as their linears have weights, on a machine that drifts by 30 % from block to block."""

    def __init__(self):
        super().__init__(self.level, noise=0.0)
        self.weights, self.drift = {}, {}

    def run(self, schedule, progress):
        for variant in schedule["variants"]:
            shapes = linear_shapes(onnx.load(variant["path"]))
            self.weights[variant["name"]] = sum(rows * columns * count for (rows, columns), count in shapes.items())
        return super().run(schedule, progress)

    def level(self, name, session, block):
        drift = self.drift.setdefault((session, block), 0.3 * self.rng.standard_normal())
        return math.log(self.weights[name] / 1e4) + drift


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


@pytest.mark.slow
def test_ratios_are_paired_within_blocks(model):
    """The machine drifts by 30 % from block to block; the ratio does not."""
    measurer = Proportional()
    narrow = [Widths({("blocks.0.mlp", "mlp_hidden"): 4}), Widths({("blocks.0.mlp", "mlp_hidden"): 96})]
    setting = Setting(device_of(measurer), Workload(batch=3, threads=2))
    timing = time_widths(model, narrow, setting, DESIGN.model_copy(update={"sessions": 2}))
    weights = measurer.weights
    wanted = [weights[name] / weights["dense"] for name in ("variant0", "variant1")]
    assert timing.ratios == pytest.approx(wanted, rel=1e-5)
    assert len(measurer.schedules) == 3, "the dense model alone, then the sessions"
    alone, *sessions = measurer.schedules
    assert ([v["name"] for v in alone["variants"]], alone["blocks"]) == (["dense"], 1)
    for schedule in sessions:
        assert [v["name"] for v in schedule["variants"]] == ["dense", "variant0", "variant1"]
        assert schedule["blocks"] == DESIGN.blocks
        assert schedule["threads"] == 2
        assert schedule["inputs"]["tensors"] == [{"shape": [3, 3, 32, 32], "dtype": "float32"}]
    assert [schedule["session"] for schedule in sessions] == [0, 1]


def fake_timer(calls, *, noise=0.0):
    """Latency in proportion to MACs; with noise a wider unit may seem faster."""

    def timed(dense, variants, setting, design, progress):
        calls.append(list(variants))
        shape = trace(dense.module, dense.family, dense.preprocess.input_size)
        ratios = [
            shape.shrunk(v, dense.groups).macs / shape.macs * (1 + noise * (-1) ** i) for i, v in enumerate(variants)
        ]
        return Timing(2.0, tuple(ratios), {"cpu": "made up"})

    return timed


def test_a_table_predicts_what_was_measured(model):
    calls = []
    choices = choices_of(model, SPLIT, MULTIPLES)
    setting = Setting(device_for("ort-cpu"), Workload(batch=2))
    table = Clock(model, choices, setting, timer=fake_timer(calls)).table()
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


def test_noise_never_makes_a_wider_unit_faster(model):
    table = Clock(model, choices_of(model, None, MULTIPLES), HERE, timer=fake_timer([], noise=0.3)).table()
    for curve in table.saved:
        shares = [share for _, share in curve.points]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0.0


@pytest.mark.slow
def test_what_was_measured_is_kept_until_something_changes(model, register, cache):
    calls = []
    choices, widths = choices_of(model, None, MULTIPLES), Widths({("blocks.0.mlp", "mlp_hidden"): 8})
    clock = Clock(model, choices, HERE, timer=fake_timer(calls))

    def asked(clock):
        before = len(calls)
        clock.table()
        clock.ratio(widths)
        return len(calls) - before

    assert asked(clock) == 3, "two classes and a check"
    assert asked(clock) == 0
    assert asked(replace(clock, dense=dense_model(**TINY, seed=1))) == 0, "weights do not matter"
    for changed in (
        replace(clock, setting=replace(HERE, workload=Workload(batch=2))),
        replace(clock, setting=replace(HERE, workload=Workload(threads=2))),
        replace(clock, setting=replace(HERE, simplify=False)),
        replace(clock, setting=Setting(device_for("eager"))),
        replace(clock, choices=choices_of(model, None, {"mlp_hidden": 16})),
    ):
        assert asked(changed) == 3
    register(TARGETS, Updated())
    assert asked(clock) == 3
    clock.forget()
    assert asked(clock) == 3, "asked to measure anew"
    for file in clock.folder().glob("*.json"):
        file.write_text("{")
    assert asked(clock) == 3, "a damaged record is no record"
    assert json.loads((clock.folder() / "table.json").read_text())["target"] == "ort-cpu"


def test_nothing_is_forgotten_under_the_feet_of_another_process(model, cache):
    """The lock stays where others wait for it, and what is measured under it stays until it is released."""
    clock = Clock(model, choices_of(model, None, MULTIPLES), HERE, timer=fake_timer([]))
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


def test_latency_of_clocks_checks_every_target(model):
    choices = choices_of(model)
    found = latency_of(
        [Clock(model, choices, Setting(device_for(target)), timer=fake_timer([])) for target in ("ort-cpu", "eager")]
    )
    assert [table.target for table in found.tables] == ["ort-cpu", "eager"]
    assert found.check(Widths()) == {"ort-cpu": 1.0, "eager": 1.0}
    assert latency_of([]).check is None


@pytest.mark.clock
@pytest.mark.parametrize("target", swept(["ort-cpu", "eager"], ["ort-cpu"]))
def test_a_real_measurement(target):
    """Files are written and timed in fresh processes. Nothing is asserted of time but that it is there."""
    model = dense_model(**{**TINY, "depth": 1})
    told, short = [], Design(sessions=1, blocks=4, slot_ms=2.0, warmup_s=0.01, looks=1)
    narrow = Widths({("blocks.0.mlp", "mlp_hidden"): 4, ("blocks.0.attn", "head_dim"): 4})
    progress = progress_to(lambda *report: told.append(report))
    found = time_widths(model, [narrow], Setting(device_for(target)), short, progress)
    assert found.dense_ms > 0
    assert 0 < found.ratios[0] < 10
    assert found.environment["threads"] == 1
    assert [share for share, _ in told] == sorted(share for share, _ in told)
